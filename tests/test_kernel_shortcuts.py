"""The interpreter with ``shortcuts.py`` and without it: equal numbers, and Triton as it was."""

from __future__ import annotations

import sys

import pytest
import torch
import triton
import triton.language as tl
from pag_fast_kernels import perturbed_attention
from pag_fast_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


def _run(monkeypatch, patching):
    """What a kernel computes whose functions call others, and how often Triton is replaced."""
    interpreter, calls = sys.modules["triton.runtime.interpreter"], []
    real = interpreter._patch_builtin

    def counted(*args):
        calls.append(1)
        return real(*args)

    q, k, v = torch.randn(3, 2, 20, 1, 40, generator=torch.Generator().manual_seed(0)).unbind()
    out = torch.zeros_like(v)
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patching)
        patch.setattr(interpreter, "_patch_builtin", counted)
        perturbed_attention(q, k, v, out, num_attend=1, num_context=3, scale=0.2)
    return out, len(calls)


def test_a_kernel_computes_the_same_in_fewer_steps(monkeypatch):
    patching = sys.modules["triton.runtime.interpreter"]._patch_lang
    if not hasattr(patching, "__wrapped__"):
        pytest.skip("an interpreter that shortcuts.py does not know")
    before = tl.load, tl.dot, tl.tensor.__add__
    out, few = _run(monkeypatch, patching)
    assert (tl.load, tl.dot, tl.tensor.__add__) == before
    expected, many = _run(monkeypatch, patching.__wrapped__)
    assert out.any() and torch.equal(out, expected)
    assert 10 * few < many


@triton.jit
def _sums(x_ptr, out_ptr, KIND: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    if KIND == "add":
        x = x + x
    elif KIND == "sub":
        x = -x - x
    else:
        x = x * 2
    tl.store(out_ptr + tl.arange(0, 4), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
def test_overflow_is_noticed(kind, dtype):
    """Of 32 bits: 64 are not checked."""
    semantic = sys.modules["triton.runtime.interpreter"].interpreter_semantic
    if not hasattr(semantic.binary_op_sanitize_overflow_impl, "__wrapped__"):
        pytest.skip("an interpreter that shortcuts.py does not know")
    x, out = torch.tensor([1, 2, 3, 2**30], dtype=dtype), torch.zeros(4, dtype=dtype)
    _sums[(1,)](x - 1, out, kind)
    assert out.tolist() == [(-2 if kind == "sub" else 2) * n for n in (x - 1).tolist()]
    if dtype == torch.int64:
        return
    with pytest.raises(Exception, match="int32 overflow detected"):
        _sums[(1,)](x + 1, out, kind)
