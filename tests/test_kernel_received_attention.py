"""The Triton kernels of ``received_attention`` in the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch, received_rounding
from pag_fast_kernels import received_attention
from pag_fast_kernels.launch import INTERPRETED

from pag_fast import ops
from pag_fast.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
# the interpreter multiplies bf16 wrongly, and does not say so
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def _check(q, k, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = received_attention(q, k, scale=scale)
    truth = reference.received_attention(q.double(), k.double(), scale=scale)
    torchs = reference.received_attention(q, k, scale=scale)
    assert_close_as_torch(out, torchs, truth, received_rounding(q, k, scale))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 80, 88, 96, 128, 160, 256])
def test_head_dims(dtype, dim, launches):  # noqa: F811
    _check(*torch.randn(2, 2, 77, 2, dim).to(dtype).unbind())
    assert launches == ["_attention_lse_kernel", "_received_attention_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 63, 64])
def test_a_small_map_takes_one_launch(dtype, tokens, launches):  # noqa: F811
    _check(*torch.randn(2, 2, tokens, 3, 40).to(dtype).unbind())
    assert launches == ["_received_attention_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [65, 144, 256, 513])
def test_lengths(dtype, tokens, launches):  # noqa: F811
    _check(*torch.randn(2, 1, tokens, 2, 32).to(dtype).unbind())


@pytest.mark.parametrize("tokens", [50, 90])
def test_slices_and_steep_scores(tokens, launches):  # noqa: F811
    """Views of a fused projection, cut to the rows of uncond; scores that a sum would overflow."""
    q, k, _ = torch.randn(4, tokens, 3, 2, 40).unbind(2)
    out = _check(30 * q[:2], 30 * k[:2], scale=1.0)
    assert torch.allclose(out.sum(1), torch.tensor(float(tokens)), rtol=1e-4)
    assert torch.equal(out, _check(30 * q[:2], 30 * k[:2], scale=1.0))


@pytest.mark.parametrize("tokens", [50, 90])
def test_the_map_is_never_written(tokens, launches, monkeypatch):  # noqa: F811
    """What the op allocates: the result, and one number for each query and head."""
    made, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kw: made.append(tuple(*shape)) or empty(*shape, **kw)
    )
    q, k = torch.randn(2, 3, tokens, 2, 16).unbind()
    ops.received_attention(q, k, backend="triton")
    assert made == [(3, tokens)] + [(3, 2, tokens)] * (tokens > 64)


@pytest.mark.parametrize("steep", [True, False], ids=["steep", "ordinary"])
def test_the_bound_catches_faults(steep, launches):  # noqa: F811
    """It grows with the rounding of the scores and stays below what a fault does.

    Steep maps are nearly one-hot, so that a scale or a precision that is off moves nothing there;
    it shows with ordinary scores.
    """
    launches.append("none needed")
    q, k, _ = torch.randn(4, 90, 3, 2, 40).unbind(2)
    size, scale = (30, 1.0) if steep else (1, 40**-0.5)
    q, k = size * q[:2], size * k[:2]
    truth = reference.received_attention(q.double(), k.double(), scale=scale)
    torchs = reference.received_attention(q, k, scale=scale)
    rounding = received_rounding(q, k, scale)
    assert rounding.max() < (0.01 if steep else 1e-5) * truth.max()
    faults = {
        "heads swapped": (q, k.roll(1, 2), scale),
        "the last key unseen": (q[:, :-1], k[:, :-1], scale),
    }
    if not steep:
        faults["fp16 inside"] = (q.half(), k.half(), scale)
        faults["scale"] = (q, k, scale * (1 + 1e-4))
    for name, (query, key, by) in faults.items():
        out = reference.received_attention(query.double(), key.double(), scale=by)
        out = torch.nn.functional.pad(out, (0, 90 - out.shape[1])).float()
        try:
            assert_close_as_torch(out, torchs, truth, rounding)
        except AssertionError:
            continue
        pytest.fail(f"the bound lets {name!r} pass")


@pytest.mark.parametrize("seed", range(4))
def test_steep_scores_whichever_way_the_blas_rounds(seed, launches):  # noqa: F811
    """Two passes as the kernel's, with products that sum in opposite orders: allowed, and inexact.

    A yardstick of PyTorch's error alone refuses some of these.
    """
    launches.append("none needed")
    torch.manual_seed(seed)
    q, k, _ = torch.randn(4, 90, 3, 2, 40).unbind(2)
    q, k = 30 * q[:2], 30 * k[:2]

    def scores(order):
        total = torch.zeros(2, 2, 90, 90)
        for d in order:
            total += q[..., d].permute(0, 2, 1)[..., None] * k[..., d].permute(0, 2, 1)[:, :, None]
        return total

    lse = torch.logsumexp(scores(range(40)), -1, keepdim=True)
    out = torch.exp(scores(reversed(range(40))) - lse).sum(2).mean(1)
    truth = reference.received_attention(q.double(), k.double(), scale=1.0)
    torchs = reference.received_attention(q, k, scale=1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_close_as_torch(out, torchs, truth)
    assert_close_as_torch(out, torchs, truth, received_rounding(q, k, 1.0))
