"""The Triton kernel of ``noisy_attention`` in the interpreter, against fp64 and its own noise."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch, attention_rounding
from pag_fast_kernels import noisy_attention
from pag_fast_kernels.launch import INTERPRETED, Config

from pag_fast import ops
from pag_fast.ops import reference

# the interpreter multiplies bf16 wrongly, and does not say so
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
pytestmark = pytest.mark.usefixtures("launches", "poisoned")
AT = {"layer": 5, "seed": 2**62 + 3 * 2**31 + 7, "sigma": 1.7}


def _inputs(dtype, rows=2, queries=20, keys=70, heads=2, dim=32):
    q = torch.randn(rows, queries, heads, dim).to(dtype)
    k, v = (torch.randn(rows, keys, heads, dim).to(dtype) for _ in range(2))
    return q, k, v, torch.full((1,), 11)


def _check(q, k, v, clock, config=None, **change):
    at = {**AT, **change}
    scale = q.shape[-1] ** -0.5
    out = noisy_attention(
        q, k, v, torch.empty_like(q), clock=clock, scale=scale, config=config, **at
    )
    wide = (x.double() for x in (q, k, v))
    truth = reference.noisy_attention(*wide, clock=clock, **at)
    same = reference.noisy_attention(q, k, v, clock=clock, **at)
    # logarithm and cosine of the noise are rounded by another library than PyTorch's
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    where = {name: at[name] for name in ("layer", "seed", "first_head") if name in at}
    noise = at["sigma"] * reference.score_noise(shape, clock, **where)
    assert_close_as_torch(out, same, truth, attention_rounding(q, k, v, scale, noise))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 80, 128])
def test_head_dims(dim, dtype):
    _check(*_inputs(dtype, dim=dim))


@pytest.mark.parametrize("keys", [1, 64, 257])
def test_lengths(keys):
    _check(*_inputs(torch.float32, keys=keys))


def test_blocks_do_not_change_the_noise():
    inputs = _inputs(torch.float32, keys=130, rows=1)
    outs = [_check(*inputs, config=Config(m, n, 4, 1)) for m, n in ((16, 16), (64, 32), (32, 128))]
    for out in outs[1:]:
        assert torch.allclose(out, outs[0], atol=1e-5)


def test_strided_and_sliced():
    fused = torch.randn(3, 60, 3, 2, 64)
    q, k, v = fused[1:].unbind(2)
    assert not q.is_contiguous()
    _check(q, k, v, torch.full((1,), 3))


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**31}, {"layer": 6}, {"clock": 12}])
def test_everything_that_counts_changes_the_noise(change):
    q, k, v, clock = _inputs(torch.float32)
    before = _check(q, k, v, clock)
    clock = torch.full((1,), change.pop("clock", 11))
    assert (_check(q, k, v, clock, **change) - before).abs().max() > 0.1


def test_rows_have_the_same_noise():
    q, k, v, clock = _inputs(torch.float32, rows=3)
    out = _check(q, k, v, clock)
    for row in (0, 2):
        alone = _check(*(x[row : row + 1] for x in (q, k, v)), clock)
        assert torch.equal(alone, out[row : row + 1])


def test_without_noise_it_is_attention():
    q, k, v, clock = _inputs(torch.float32)
    out = _check(q, k, v, clock, sigma=0.0)
    assert torch.allclose(out, ops.softmax_attention(q, k, v), atol=1e-6)


def test_some_of_the_heads():
    """Noise counts heads from where it is told; its launch is prepared anew for other heads."""
    q, k, v, clock = _inputs(torch.float32, heads=4)
    whole = _check(q, k, v, clock)
    parts = [
        _check(*(x[:, :, h : h + 2].contiguous() for x in (q, k, v)), clock, first_head=h)
        for h in (0, 2)
    ]
    assert (torch.cat(parts, dim=2) - whole).abs().max() < 1e-5
