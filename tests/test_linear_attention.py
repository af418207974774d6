"""``linear_attention`` (Sana): the op against fp64, the reference against diffusers, FLOPs."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from numerics import assert_close_as_torch, relative
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.ops.linear_attention import torch_linear_attention
from pag_fast.processors import PerturbedLinearAttention
from pag_fast.sharing.rows import BranchState

# tokens, heads, head_dim, attend, perturbed, forked
SHAPES = [
    (1, 1, 32, 1, 1, 0),
    (77, 2, 32, 2, 1, 0),
    (256, 3, 40, 4, 2, 0),
    (1023, 2, 32, 2, 0, 1),
    (1024, 1, 64, 3, 0, 0),
    (77, 2, 32, 0, 2, 0),
]


def _tensors(shape, dtype, sliced=False):
    tokens, heads, dim, attend, perturbed, _ = shape
    made = []
    for rows in (attend, attend, attend + perturbed):
        x = torch.randn(rows, tokens, 2 if sliced else 1, heads, dim, dtype=torch.float64)
        made.append(x.to(dtype)[:, :, -1])
    return made


def _attention(**kwargs) -> Attention:
    attn = Attention(query_dim=64, heads=4, dim_head=16, bias=False, **kwargs).double().eval()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_(std=0.3)
    return attn


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape, dtype, sliced, poisoned):
    q, k, v = _tensors(shape, dtype, sliced)
    arguments = {"num_attend": shape[3], "num_forked": shape[5]}
    out = ops.linear_attention(q, k, v, **arguments)
    truth = reference.linear_attention(q.double(), k.double(), v.double(), **arguments)
    assert_close_as_torch(out, reference.linear_attention(q, k, v, **arguments), truth)


@pytest.mark.parametrize("cfg", [True, False])
def test_reference_equals_diffusers(cfg):
    # diffusers computes in fp32 whatever the dtype: compare its arithmetic in fp64
    attn, slabs = _attention(), 3 if cfg else 2
    x = torch.randn(2 * slabs, 49, 64, dtype=torch.float64)
    pag = "PAGCFGSanaLinearAttnProcessor2_0" if cfg else "PAGIdentitySanaLinearAttnProcessor2_0"
    attend = 2 * (slabs - 1)
    q, k, v = (
        getattr(attn, f"to_{n}")(rows).unflatten(-1, (4, -1))
        for n, rows in (("q", x[:attend]), ("k", x[:attend]), ("v", x))
    )
    out = reference.linear_attention(q, k, v, num_attend=attend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected = getattr(stock, pag)()(attn, x)
    assert relative(attn.to_out[0](out.flatten(2)), expected) < 1e-10


@pytest.mark.parametrize("level", [0, 1, 2])
def test_processor_equals_diffusers(level):
    attn = _attention()
    image = torch.randn(2, 49, 64, dtype=torch.float64)
    uncond = image if level == 0 else torch.randn_like(image)
    x = torch.cat([uncond, image, image if level < 2 else torch.randn_like(image)])
    expected = stock.PAGCFGSanaLinearAttnProcessor2_0()(attn, x)
    state = BranchState()
    state.slabs = (1, 2, 3)
    out = PerturbedLinearAttention(state, level)(attn, x[: 2 * (level + 1)])
    # diffusers rounds to fp32 inside, so fp32 is what can be asked for
    assert relative(out, expected) < 1e-6


def test_processor_applies_qk_norm():
    """diffusers' PAG processor leaves Sana's QK-norm out, its ordinary one has it."""
    attn = _attention(qk_norm="rms_norm_across_heads", kv_heads=4)
    x = torch.randn(2, 49, 64, dtype=torch.float64)
    expected = stock.SanaLinearAttnProcessor2_0()(attn, x)
    assert relative(PerturbedLinearAttention()(attn, x), expected) < 1e-6


def test_fp16_stays_finite():
    attn = _attention().float()
    with torch.no_grad():
        attn.to_out[0].weight.fill_(1000.0)
    attn = attn.half()
    state = BranchState()
    state.slabs = (3, 3, 3)
    out = PerturbedLinearAttention(state)(attn, 100 * torch.randn(3, 9, 64).half())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3]], ids=str)
def test_no_work_hides_from_the_flop_counter(shape):
    q, k, v = _tensors(shape, torch.float32)
    with FlopCounterMode(display=False) as outside:
        ops.linear_attention(
            *(x.to("meta") for x in (q, k, v)), num_attend=shape[3], num_forked=shape[5]
        )
    with FlopCounterMode(display=False) as inside:
        torch_linear_attention(q, k, v, shape[3], shape[5])
    assert outside.get_total_flops() == inside.get_total_flops() > 0


def test_opcheck():
    for shape in (SHAPES[1], SHAPES[3]):
        q, k, v = _tensors(shape, torch.float32)
        torch.library.opcheck(
            torch.ops.pag_fast.linear_attention.default, (q, k, v, shape[3], shape[5], "torch")
        )


def test_bad_arguments():
    q, k, v = _tensors(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="num_attend must be in"):
        ops.linear_attention(q, k, v, num_attend=5)
    with pytest.raises(ValueError, match="q and k must have shape"):
        ops.linear_attention(q[:1], k, v, num_attend=2)
