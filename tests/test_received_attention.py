"""``received_attention``: the op against fp64, the reference against diffusers, its memory."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from numerics import assert_close_as_torch, received_rounding, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.ops.backend import IMPLEMENTATIONS
from pag_fast.ops.received_attention import torch_received_attention
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sag.attention import QueriesAndKeys, received_from_map

# rows, tokens, heads, head_dim
SHAPES = [(1, 1, 1, 8), (2, 77, 3, 40), (1, 64, 8, 160), (3, 256, 2, 64)]


def _pair(shape, dtype, sliced=False):
    rows, tokens, heads, dim = shape
    x = torch.randn(2, rows, tokens, 3 if sliced else 1, heads, dim, dtype=torch.float64)
    return (2 * x).to(dtype)[:, :, :, -1].unbind()


@row_wise
class Shapes(TorchDispatchMode):
    """The shapes of everything that is made, inside of our ops too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out

    def has_map(self, tokens):
        """Whether anything holds a score for every query and key."""
        return any(shape[-2:] == (tokens, tokens) for shape in self.seen)


def _stock_map(attn, x):
    """The map that diffusers' CrossAttnStoreProcessor stores, [rows · heads, N, N]."""
    query, key = (attn.head_to_batch_dim(layer(x)) for layer in (attn.to_q, attn.to_k))
    return attn.get_attention_scores(query, key, None)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape, dtype, sliced):
    q, k = _pair(shape, dtype, sliced)
    for scale in (None, 0.3):
        out = ops.received_attention(q, k, scale=scale)
        assert out.dtype == torch.float32
        truth = reference.received_attention(q.double(), k.double(), scale=scale)
        same_dtype = reference.received_attention(q, k, scale=scale)
        rounding = received_rounding(q, k, shape[3] ** -0.5 if scale is None else scale)
        assert_close_as_torch(out, same_dtype, truth, rounding)


def test_reference_is_what_diffusers_computes_from_its_map():
    attn = Attention(48, heads=3, dim_head=16).double()
    x = torch.randn(4, 49, 48, dtype=torch.float64)
    attention_map = _stock_map(attn, x)
    # as in StableDiffusionSAGPipeline.sag_masking
    expected = attention_map.reshape(4, 3, 49, 49).mean(1, keepdim=False).sum(1, keepdim=False)
    q, k = (layer(x).unflatten(-1, (3, -1)) for layer in (attn.to_q, attn.to_k))
    assert relative(reference.received_attention(q, k), expected) < 1e-10
    assert relative(received_from_map(attention_map, 4), expected) < 1e-10
    assert relative(ops.received_attention(q, k), expected) < 1e-10
    assert expected.std() > 1e-3
    uncond, cond = QueriesAndKeys(q, k).chunk(2)
    assert relative(uncond.received("auto"), expected[:2]) < 1e-10
    assert relative(cond.received("auto"), expected[2:]) < 1e-10


def test_everything_that_is_given_is_received():
    q, k = _pair(SHAPES[1], torch.float64)
    received = ops.received_attention(q, k)
    assert torch.allclose(received.sum(1), torch.tensor(77.0, dtype=torch.float64))


def test_the_map_is_never_whole():
    """Not more scores at a time than the queries have elements."""
    q, k = _pair((2, 96, 2, 40), torch.float32)
    with Shapes() as shapes:
        ops.received_attention(q, k)
    assert shapes.seen and not shapes.has_map(96)
    assert max(torch.Size(shape).numel() for shape in shapes.seen) == q.numel()
    with Shapes() as shapes:
        reference.received_attention(q, k)
    assert shapes.has_map(96)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_work_hides_from_the_flop_counter(shape):
    q, k = _pair(shape, torch.float32)
    with FlopCounterMode(display=False) as outside:
        ops.received_attention(q.to("meta"), k.to("meta"))
    with FlopCounterMode(display=False) as inside:
        torch_received_attention(q, k, None)
    assert outside.get_total_flops() == inside.get_total_flops() > 0


def test_opcheck():
    for scale in (None, 0.3):
        q, k = _pair(SHAPES[1], torch.float32)
        torch.library.opcheck(torch.ops.pag_fast.received_attention.default, (q, k, scale, "torch"))


def test_bad_arguments():
    q, k = _pair(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="q and k of one shape"):
        ops.received_attention(q, k[:1])
    with pytest.raises(ValueError, match=r"one dtype; got .* torch\.float16"):
        ops.received_attention(q, k.half())
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        ops.received_attention(q, k, backend="cuda")
