"""Kernels read operands wherever they lie: every operand in every layout, against the reference."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import relative

from pag_fast import ops
from pag_fast.ops import reference

ROWS, TOKENS, HEADS, DIM = 3, 20, 2, 8


def _every_other(x):
    return torch.stack([x, -x], -1).flatten(-2)[..., ::2]


def _channels_first(x):
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _expanded(x):
    return x[..., :1].expand(x.shape)


LAYOUTS = [_every_other, _channels_first, _expanded]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
by_operand = pytest.mark.parametrize("which", range(3), ids="qkv")


def _qkv(which, layout):
    operands = [torch.randn(ROWS, TOKENS, HEADS, DIM) for _ in range(3)]
    operands[which] = layout(operands[which])
    return operands


def _close(found, wanted):
    assert relative(found, wanted) < 1e-5


@by_layout
@by_operand
@pytest.mark.parametrize(
    "options",
    [{"num_attend": 3}, {"num_attend": 2, "num_context": 5}, {"num_attend": 3, "num_forked": 1}],
    ids=["attending", "joint", "fork"],
)
def test_perturbed_attention(which, layout, options, launches):  # noqa: F811
    q, k, v = _qkv(which, layout)
    found = ops.perturbed_attention(q, k, v, backend="triton", **options)
    assert launches
    _close(found, reference.perturbed_attention(q, k, v, **options))


@by_layout
@by_operand
def test_linear_attention(which, layout, launches):  # noqa: F811
    q, k, v = _qkv(which, layout)
    for options in ({"num_attend": 3, "num_forked": 1}, {"num_attend": 2}):
        rows = slice(options["num_attend"])
        found = ops.linear_attention(q[rows], k[rows], v, backend="triton", **options)
        _close(found, reference.linear_attention(q[rows], k[rows], v, **options))
    assert launches


@by_layout
@by_operand
def test_noisy_attention(which, layout, launches):  # noqa: F811
    q, k, v = _qkv(which, layout)
    clock = torch.tensor(3)
    found = ops.noisy_attention(q, k, v, clock=clock, backend="triton")
    assert launches
    _close(found, reference.noisy_attention(q, k, v, clock=clock))


@by_layout
@pytest.mark.parametrize("which", range(2), ids="qk")
def test_received_attention(which, layout, launches):  # noqa: F811
    q, k, _ = _qkv(which, layout)
    found = ops.received_attention(q, k, backend="triton")
    assert launches
    _close(found, reference.received_attention(q, k))


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("which", range(2), ids="qk")
def test_qk_norm_rope(which, layout, launches):  # noqa: F811
    q, k, _ = _qkv(which, layout)
    affine, rotary = torch.randn(2, DIM).unbind(), torch.randn(2, TOKENS, DIM).unbind()
    options = {"q_affine": affine, "k_affine": affine, "rotary": rotary}
    wanted = reference.qk_norm_rope(q, k, **options)
    ops.qk_norm_rope_(q, k, backend="triton", **options)
    assert launches
    _close(torch.cat([q, k]), torch.cat(wanted))


BIASES = {
    "one number": lambda: torch.full((1, 1, 1, 1), 0.5),
    "a number a row": lambda: torch.randn(ROWS, 1, 1, 1),
    "expanded": lambda: torch.randn(1, 1, 1, 1).expand(1, 1, 1, TOKENS),
    "every other": lambda: torch.randn(ROWS, HEADS, 1, 2 * TOKENS)[..., ::2],
    "rows last": lambda: torch.randn(TOKENS, HEADS, 1, ROWS).permute(3, 1, 2, 0),
    "fp16, aligned on nothing": lambda: torch.randn(1 + TOKENS).half()[1:].view(1, 1, 1, -1),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("perturbation", ["identity", "blur", "soft"])
def test_key_bias(name, perturbation, launches):  # noqa: F811
    q, k, v = torch.randn(3, ROWS, TOKENS, HEADS, DIM).unbind()
    options = {"num_attend": 2, "perturbation": perturbation, "attn_mask": BIASES[name]()}
    if perturbation == "soft":
        options["strength"] = torch.rand(HEADS)
    if perturbation == "identity":
        # the mask may have the rows of v
        q, k = q[:2], k[:2]
    found = ops.perturbed_attention(q, k, v, backend="triton", **options)
    assert launches
    _close(found, reference.perturbed_attention(q, k, v, **options))


@pytest.mark.parametrize(
    "strength",
    [torch.rand(HEADS, 3)[:, 1], torch.tensor(0.4).expand(HEADS), torch.rand(HEADS).double()],
    ids=["column", "expanded", "fp64"],
)
def test_strength(strength, launches):  # noqa: F811
    q, k, v = torch.randn(3, ROWS, TOKENS, HEADS, DIM).unbind()
    options = {"num_attend": 2, "perturbation": "soft", "strength": strength}
    found = ops.perturbed_attention(q, k, v, backend="triton", **options)
    assert launches
    _close(found, reference.perturbed_attention(q, k, v, **options))


WEIGHT, BIAS = torch.linspace(0.5, 2.0, 2 * DIM)[::2], torch.tensor(0.3).expand(DIM)
AFFINE = {
    "strided": {"q_affine": (WEIGHT, BIAS), "k_affine": (WEIGHT, BIAS)},
    "weights": {"q_affine": (WEIGHT, None), "k_affine": (WEIGHT, None)},
    "biases": {"q_affine": (None, BIAS), "k_affine": (None, BIAS)},
    "of q": {"q_affine": (WEIGHT, BIAS), "k_affine": None},
    "of k": {"q_affine": None, "k_affine": (WEIGHT, BIAS)},
    "one of each": {"q_affine": (WEIGHT, None), "k_affine": (None, BIAS)},
    "none": {"q_affine": (None, None), "k_affine": None},
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_parts_may_be_missing(name, backend):
    q, k = torch.randn(2, ROWS, TOKENS, HEADS, DIM).unbind()
    options = AFFINE[name]
    norms = []
    for x, affine in ((q, options["q_affine"]), (k, options["k_affine"])):
        norms.append(torch.nn.functional.layer_norm(x, (DIM,), *(affine or ()), eps=1e-6))
    ops.qk_norm_rope_(q, k, rotary=None, backend=backend, **options)
    _close(torch.cat([q, k]), torch.cat(norms))


@pytest.mark.parametrize("call", ["combine", "degrade", "attention", "linear"])
def test_an_empty_batch(call):
    x = torch.randn(0, 4, 8, 8)
    blur = reference.gaussian_kernel(4, 3)
    sizes = {"map_size": (2, 2), "clean": (1.0, -0.5), "noise": (0.2, 0.9)}
    found = {
        "combine": lambda: ops.combine_guidance(
            x, x, x, guidance_scale=5.0, pag_scale=3.0, rescale=0.5, backend="triton"
        ),
        "degrade": lambda: ops.degrade_latents(
            x, x, torch.ones(0, 4), blur, **sizes, backend="triton"
        ),
        "attention": lambda: ops.perturbed_attention(x, x, x, num_attend=0, backend="triton"),
        "linear": lambda: ops.linear_attention(x, x, x, num_attend=0, backend="triton"),
    }[call]()
    assert found.shape == x.shape
