"""The Triton kernel of ``qk_norm_rope`` in the interpreter, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch
from pag_fast_kernels import qk_norm_rope

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _norm(dim, dtype):
    norm = torch.nn.LayerNorm(dim, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.to(dtype)


@torch.no_grad()
def _stock(x, norm, rotary):
    x = x if norm is None else norm(x)
    if rotary is None:
        return x
    return apply_rotary_emb(x.transpose(1, 2), rotary).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 72, 88, 128])
@pytest.mark.parametrize("parts", ["norm and rope", "norm", "rope"])
def test_against_fp64(dtype, dim, parts, launches):  # noqa: F811
    q, k = torch.randn(2, 2, 45, 3, dim).to(dtype).unbind()
    norms = [_norm(dim, dtype) if "norm" in parts else None for _ in range(2)]
    rotary = (torch.randn(45, dim), torch.randn(45, dim)) if "rope" in parts else None
    wide = None if rotary is None else tuple(x.double() for x in rotary)
    expected = [_stock(x, norm, rotary) for x, norm in zip((q, k), norms, strict=True)]
    truth = [
        _stock(x.double(), copy.deepcopy(norm) and copy.deepcopy(norm).double(), wide)
        for x, norm in zip((q, k), norms, strict=True)
    ]
    affine = [None if norm is None else (norm.weight.data, norm.bias.data) for norm in norms]
    qk_norm_rope(q, k, *affine, rotary, eps=1e-6, norm="norm" in parts)
    assert len(launches) == 1
    for ours, theirs, true in zip((q, k), expected, truth, strict=True):
        assert_close_as_torch(ours, theirs, true)


def test_slices_stay_within_their_tile(launches):  # noqa: F811
    """In place on slices of a fused projection: what lies between them is not touched."""
    fused = torch.randn(2, 45, 3, 2, 72)
    before = fused.clone()
    q, k, _ = fused.unbind(2)
    norms = _norm(72, torch.float32), _norm(72, torch.float32)
    expected = [_stock(x, n, None) for x, n in zip(before.unbind(2)[:2], norms, strict=True)]
    qk_norm_rope(q, k, *((n.weight.data, n.bias.data) for n in norms), None, eps=1e-6)
    assert torch.equal(fused[:, :, 2], before[:, :, 2])
    assert torch.allclose(q, expected[0], atol=1e-5)
    assert torch.allclose(k, expected[1], atol=1e-5)
