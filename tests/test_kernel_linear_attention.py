"""The Triton kernels of ``linear_attention`` in the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch
from pag_fast_kernels import linear_attention
from pag_fast_kernels.launch import INTERPRETED

from pag_fast.ops import reference
from pag_fast.ops.linear_attention import torch_linear_attention

pytestmark = pytest.mark.usefixtures("poisoned")
# the interpreter multiplies bf16 wrongly, and does not say so
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
MIXES = {"cfg": (3, 2, 0), "cfg off": (2, 1, 0), "fork": (2, 2, 1), "all attend": (2, 2, 0)}
MIXES["none attends"] = (2, 0, 0)


def _check(q, k, v, num_attend, num_forked):
    q, k = q[:num_attend], k[:num_attend]
    out = v.new_empty((len(v) + num_forked, *v.shape[1:]))
    mix = {"num_attend": num_attend, "num_forked": num_forked}
    linear_attention(q, k, v, out, **mix)
    truth = reference.linear_attention(q.double(), k.double(), v.double(), **mix)
    torchs = torch_linear_attention(q, k, v, num_attend, num_forked)
    assert_close_as_torch(out, torchs, truth)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 16, 32, 40, 64])
def test_head_dims(dtype, dim, launches):  # noqa: F811
    _check(*(torch.randn(3, 77, 2, dim).to(dtype) for _ in range(3)), 2, 0)
    assert len(launches) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 256, 1023, 1024, 4097])
def test_lengths(dtype, tokens, launches):  # noqa: F811
    _check(*(torch.randn(2, tokens, 1, 32).to(dtype) for _ in range(3)), 1, 0)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_row_mixes_of_a_fused_projection(mix, launches):  # noqa: F811
    rows, num_attend, num_forked = mix
    q, k, v = torch.randn(rows, 90, 3, 2, 32).unbind(2)
    out = _check(q, k, v, num_attend, num_forked)
    if num_forked:
        assert torch.equal(out[num_attend:], v[num_attend - num_forked :])
    else:
        assert torch.equal(out[num_attend:], v[num_attend:])
