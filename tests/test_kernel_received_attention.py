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


def test_steep_scores_catch_a_fault(launches):  # noqa: F811
    """The bound grows with the scores' rounding, not with the scores: 1e-4 of the scale shows."""
    launches.append("none needed")
    q, k, _ = torch.randn(4, 90, 3, 2, 40).unbind(2)
    q, k = 30 * q[:2], 30 * k[:2]
    truth = reference.received_attention(q.double(), k.double(), scale=1.0)
    torchs = reference.received_attention(q, k, scale=1.0)
    rounding = received_rounding(q, k, 1.0)
    assert rounding.max() < 0.01 * truth.max()
    for wrong in ((q, k.roll(1, 2), 1.0), (q, k, 1 - 1e-4), (q[:, :-1], k[:, :-1], 1.0)):
        out = reference.received_attention(*(x.double() for x in wrong[:2]), scale=wrong[2])
        out = torch.nn.functional.pad(out, (0, 90 - out.shape[1])).float()
        with pytest.raises(AssertionError, match="error"):
            assert_close_as_torch(out, torchs, truth, rounding)
