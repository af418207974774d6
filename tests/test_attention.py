"""``perturbed_attention``: the op against fp64, the reference against diffusers, FLOPs, fakes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from numerics import assert_close_as_torch, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.processors import PerturbedJointAttention, PerturbedSelfAttention
from pag_fast.sharing.rows import BranchState

# the package's attribute of that name is the function
op = importlib.import_module("pag_fast.ops.perturbed_attention")


@dataclass(frozen=True)
class Problem:
    tokens: int
    heads: int
    dim: int
    attend: int
    perturbed: int
    context: int = 0
    forked: int = 0

    def __str__(self) -> str:
        kind = f"T{self.context}-" if self.context else ""
        rows = f"{self.attend}+{self.perturbed}" + (f"f{self.forked}" if self.forked else "")
        return f"N{self.tokens}-{kind}H{self.heads}-D{self.dim}-{rows}"

    def tensors(self, dtype: torch.dtype, layout: str = "plain") -> tuple[torch.Tensor, ...]:
        """q, k and v in fp64 rounded to ``dtype``; ``layout`` picks how they lie in memory."""
        rows = self.attend + self.perturbed
        query_rows = rows if self.context else self.attend
        made = []
        for count in (query_rows, query_rows, rows):
            shape = (count, self.tokens, self.heads, self.dim)
            if layout == "sliced":  # a fused projection's chunk
                x = torch.randn(count, self.tokens, 3, self.heads, self.dim, dtype=torch.float64)
                x = x.to(dtype)[:, :, 1]
            elif layout == "heads_first":
                x = torch.randn(shape, dtype=torch.float64).to(dtype)
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            else:
                x = torch.randn(shape, dtype=torch.float64).to(dtype)
            made.append(x)
        return tuple(made)

    @property
    def arguments(self) -> dict[str, int]:
        return {
            "num_attend": self.attend,
            "num_context": self.context,
            "num_forked": self.forked,
        }


PROBLEMS = [
    Problem(1, 1, 32, 1, 1),
    Problem(16, 2, 40, 2, 1),
    Problem(77, 2, 64, 2, 1),
    Problem(77, 3, 72, 1, 1),
    Problem(256, 2, 80, 4, 2),
    Problem(1023, 1, 88, 2, 1),
    Problem(1024, 1, 160, 1, 0, forked=1),
    Problem(64, 2, 64, 4, 0, forked=2),
    Problem(64, 2, 64, 3, 0),
    Problem(80, 2, 64, 2, 1, context=13),
    Problem(333, 2, 64, 4, 2, context=77),
    Problem(100, 2, 72, 2, 0, context=36, forked=1),
    Problem(77, 2, 40, 0, 2),
    Problem(80, 2, 64, 0, 1, context=13),
    Problem(2049, 1, 64, 2, 1),
    # a forward of the perturbed branch alone
    Problem(77, 2, 64, 0, 2),
    Problem(80, 2, 64, 0, 2, context=13),
]


# many tokens lie in memory as few do
@pytest.mark.parametrize(
    ("problem", "layout"),
    [
        (problem, layout)
        for problem in PROBLEMS
        for layout in ("plain", "sliced", "heads_first")
        if layout == "plain" or problem.tokens < 500
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_fp64(problem, dtype, layout, poisoned):
    q, k, v = problem.tensors(dtype, layout)
    out = ops.perturbed_attention(q, k, v, **problem.arguments)
    truth = reference.perturbed_attention(q.double(), k.double(), v.double(), **problem.arguments)
    same = reference.perturbed_attention(q, k, v, **problem.arguments)
    assert out.dtype == dtype
    assert_close_as_torch(out, same, truth)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not p.forked], ids=str)
def test_in_place_equals_functional(problem):
    q, k, v = problem.tensors(torch.float32)
    rows = {"num_attend": problem.attend, "num_context": problem.context}
    expected = ops.perturbed_attention(q, k, v, **rows)
    out = ops.perturbed_attention_(q, k, v, **rows)
    assert out is v
    assert torch.equal(out, expected)


def test_identity_rows_are_values_bitwise():
    q, k, v = Problem(77, 2, 40, 2, 3).tensors(torch.bfloat16)
    out = ops.perturbed_attention(q, k, v, num_attend=2)
    assert torch.equal(out[2:], v[2:])


@pytest.mark.parametrize("boolean", [True, False])
def test_mask_applies_to_attending_rows_only(boolean):
    q, k, v = Problem(33, 2, 32, 2, 1).tensors(torch.float64)
    keep = torch.rand(2, 1, 33, 33) > 0.3
    mask = keep if boolean else torch.where(keep, 0.0, -torch.inf).double()
    out = ops.perturbed_attention(q, k, v, num_attend=2, attn_mask=mask)
    truth = reference.perturbed_attention(q, k, v, num_attend=2, attn_mask=mask)
    assert relative(out, truth) < 1e-12


def test_scale_is_used():
    q, k, v = Problem(40, 2, 32, 2, 1, context=8).tensors(torch.float64)
    out = ops.perturbed_attention(q, k, v, num_attend=2, num_context=8, scale=0.7)
    truth = reference.perturbed_attention(q, k, v, num_attend=2, num_context=8, scale=0.7)
    assert relative(out, truth) < 1e-12
    assert relative(ops.perturbed_attention(q, k, v, num_attend=2, num_context=8), truth) > 1e-3


# ---- the reference, and the processors, against diffusers in fp64 ----


def _attention(**kwargs) -> Attention:
    attn = Attention(query_dim=64, heads=4, dim_head=16, **kwargs).double().eval()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_(std=0.3)
    return attn


def _project(attn, x, which):
    return getattr(attn, which)(x).unflatten(-1, (attn.heads, -1))


@pytest.mark.parametrize("cfg", [True, False])
def test_reference_equals_diffusers_identity(cfg):
    attn, slabs = _attention(), 3 if cfg else 2
    x = torch.randn(2 * slabs, 49, 64, dtype=torch.float64)
    name = "PAGCFGIdentitySelfAttnProcessor2_0" if cfg else "PAGIdentitySelfAttnProcessor2_0"
    expected = getattr(stock, name)()(attn, x)
    attend = 2 * (slabs - 1)
    q, k = _project(attn, x[:attend], "to_q"), _project(attn, x[:attend], "to_k")
    out = reference.perturbed_attention(q, k, _project(attn, x, "to_v"), num_attend=attend)
    assert relative(attn.to_out[0](out.flatten(2)), expected) < 1e-10


@pytest.mark.parametrize("cfg", [True, False])
def test_reference_equals_diffusers_joint(cfg):
    attn, slabs = (
        _attention(added_kv_proj_dim=64, out_dim=64, context_pre_only=False),
        3 if cfg else 2,
    )
    x = torch.randn(2 * slabs, 36, 64, dtype=torch.float64)
    text = torch.randn(2 * slabs, 11, 64, dtype=torch.float64)
    name = "PAGCFGJointAttnProcessor2_0" if cfg else "PAGJointAttnProcessor2_0"
    expected, expected_text = getattr(stock, name)()(attn, x, text)
    q, k, v = (
        torch.cat([_project(attn, x, f"to_{n}"), _project(attn, text, f"add_{n}_proj")], 1)
        for n in "qkv"
    )
    out = reference.perturbed_attention(q, k, v, num_attend=2 * (slabs - 1), num_context=11)
    out = out.flatten(2)
    assert relative(attn.to_out[0](out[:, :36]), expected) < 1e-10
    assert relative(attn.to_add_out(out[:, 36:]), expected_text) < 1e-10


@pytest.mark.parametrize("spatial", [False, True], ids=["tokens", "image"])
@pytest.mark.parametrize("cfg", [True, False])
def test_self_attention_processor_equals_diffusers(cfg, spatial):
    """With everything an ``Attention`` can carry: group norm, residual, output scale, 4-D input."""
    attn = _attention(norm_num_groups=4, residual_connection=True, rescale_output_factor=1.7)
    slabs = 3 if cfg else 2
    x = torch.randn(2 * slabs, 49, 64, dtype=torch.float64)
    if spatial:
        x = x.transpose(1, 2).unflatten(2, (7, 7)).contiguous()
    else:
        attn.residual_connection = False
    name = "PAGCFGIdentitySelfAttnProcessor2_0" if cfg else "PAGIdentitySelfAttnProcessor2_0"
    expected = getattr(stock, name)()(attn, x)
    state = BranchState()
    state.slabs = (slabs, slabs, slabs)
    assert relative(PerturbedSelfAttention(state)(attn, x), expected) < 1e-10


@pytest.mark.parametrize("merged", [False, True])
def test_fork_equals_diffusers(merged):
    """At the fork the processor takes the shared rows and returns every branch."""
    attn = _attention()
    image = torch.randn(2, 49, 64, dtype=torch.float64)
    uncond = image if merged else torch.randn_like(image)
    x = torch.cat([uncond, image, image])
    expected = stock.PAGCFGIdentitySelfAttnProcessor2_0()(attn, x)
    state = BranchState()
    state.slabs = (1, 2, 3)
    processor = PerturbedSelfAttention(state, level=0 if merged else 1)
    out = processor(attn, image if merged else x[:4])
    assert relative(out, expected) < 1e-10


@pytest.mark.parametrize("forked", [False, True])
def test_joint_processor_equals_diffusers(forked):
    attn = _attention(added_kv_proj_dim=64, out_dim=64, context_pre_only=False)
    x, text = (torch.randn(6, n, 64, dtype=torch.float64) for n in (36, 11))
    if forked:
        x[4:], text[4:] = x[2:4], text[2:4]
    expected, expected_text = stock.PAGCFGJointAttnProcessor2_0()(attn, x, text)
    state = BranchState()
    state.slabs = (2, 2, 3)
    rows = 4 if forked else 6
    processor = PerturbedJointAttention(state, level=1 if forked else 2)
    out, out_text = processor(attn, x[:rows], text[:rows])
    assert relative(out, expected) < 1e-10
    assert relative(out_text, expected_text) < 1e-10


def test_joint_processor_applies_qk_norm():
    """SD3.5: diffusers' PAG processor leaves the norms out, its ordinary one has them."""
    attn = _attention(
        added_kv_proj_dim=64, out_dim=64, context_pre_only=False, qk_norm="rms_norm", eps=1e-6
    )
    x, text = (torch.randn(2, n, 64, dtype=torch.float64) for n in (36, 11))
    expected, expected_text = stock.JointAttnProcessor2_0()(attn, x, text)
    out, out_text = PerturbedJointAttention()(attn, x, text)
    assert relative(out, expected) < 1e-10
    assert relative(out_text, expected_text) < 1e-10


# ---- the op as an op ----


@pytest.mark.parametrize("problem", [PROBLEMS[i] for i in (1, 7, 9, 11, -2, -1)], ids=str)
def test_opcheck(problem):
    q, k, v = problem.tensors(torch.float32)
    rows = (problem.attend, problem.context, None, None, problem.forked)
    torch.library.opcheck(
        torch.ops.pag_fast.perturbed_attention.default,
        (q, k, v, *rows, "identity", None, "torch"),
    )


def test_opcheck_in_place():
    for problem in (PROBLEMS[1], PROBLEMS[9], PROBLEMS[-1]):
        q, k, v = problem.tensors(torch.float32)
        rows = (problem.attend, problem.context)
        torch.library.opcheck(
            torch.ops.pag_fast.perturbed_attention_.default, (q, k, v, *rows, None, None)
        )


@pytest.mark.parametrize("problem", PROBLEMS[:3] + PROBLEMS[9:12] + PROBLEMS[-2:], ids=str)
def test_fake_on_a_gpu_that_is_not_there(problem):
    real = ops.perturbed_attention(*problem.tensors(torch.float32), **problem.arguments)
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, device="cuda") for x in problem.tensors(torch.float32))
        fake = ops.perturbed_attention(q, k, v, **problem.arguments)
    assert fake.device.type == "cuda"
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@pytest.mark.parametrize("problem", [*PROBLEMS[1:12], PROBLEMS[-1]], ids=str)
def test_no_work_hides_from_the_flop_counter(problem):
    """The op's formula against the same work counted op by op, inside."""
    q, k, v = (x.to("meta") for x in problem.tensors(torch.float32))
    with FlopCounterMode(display=False) as outside:
        ops.perturbed_attention(q, k, v, **problem.arguments)
    # on the meta device every product below is counted; PyTorch's fused CPU kernel has no formula
    with FlopCounterMode(display=False) as inside:
        op.torch_perturbed_attention(
            q, k, v, problem.attend, problem.context, None, None, problem.forked
        )
    assert outside.get_total_flops() == inside.get_total_flops() > 0


def test_flops_of_stock_attention_are_counted_alike():
    """The formula counts SDPA as PyTorch's own formula does."""
    q, k, v = (torch.randn(3, 50, 2, 32, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as ours:
        ops.perturbed_attention(q, k, v, num_attend=3)
    with FlopCounterMode(display=False) as theirs:
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert ours.get_total_flops() == theirs.get_total_flops()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attend": -1}, "num_attend must be in 0..3"),
        ({"num_attend": 4}, "num_attend must be in 0..3"),
        ({"num_context": 16}, "num_context must be in 0..15"),
        ({"num_forked": 1}, "num_forked=1 needs every row"),
        ({"backend": "cuda"}, "choose one of auto, torch, triton"),
        ({"num_context": 4}, "q and k must have shape"),
    ],
)
def test_bad_arguments(change, message):
    q, k, v = Problem(16, 2, 32, 2, 1).tensors(torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.perturbed_attention(q, k, v, **{"num_attend": 2, **change})


def test_bad_shapes_and_dtypes():
    q, k, v = Problem(16, 2, 32, 2, 1).tensors(torch.float32)
    with pytest.raises(ValueError, match="rows, tokens, heads, head_dim"):
        ops.perturbed_attention(q.flatten(2), k, v, num_attend=2)
    with pytest.raises(ValueError, match="must share a dtype"):
        ops.perturbed_attention(q.half(), k, v, num_attend=2)
