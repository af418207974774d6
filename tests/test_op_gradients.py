"""Derivatives of ops by each tensor alone, backward and forward, against their references."""

from __future__ import annotations

import contextlib

import pytest
import torch
from numerics import relative
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference

ROWS, TOKENS, HEADS, DIM = 3, 12, 2, 8


def _attention(run, **options):
    def call(x):
        options_of = dict(options)
        for name in ("attn_mask", "strength"):
            if name in x:
                options_of[name] = x[name]
        # the in-place form is handed memory that it may use
        return run(x["q"], x["k"], x["v"] * 1.0, **options_of)

    return call


def _norm(run):
    def call(x):
        options = {
            "q_affine": (x["q_weight"], x["q_bias"]),
            "k_affine": (x["k_weight"], None),
            "rotary": (x["cos"], x["sin"]),
        }
        q, k = x["q"] * 1.0, x["k"] * 1.0
        found = run(q, k, **options)
        return torch.cat([q, k] if found is None else found)

    return call


def _tensors(**more):
    shapes = dict.fromkeys("qkv", (ROWS, TOKENS, HEADS, DIM)) | more
    return {name: torch.rand(shape) + 0.1 for name, shape in shapes.items()}


MASK, CLOCK = (ROWS, 1, 1, TOKENS), torch.tensor(2)
VECTORS = dict.fromkeys(("q_weight", "q_bias", "k_weight"), (DIM,))
TABLES = dict.fromkeys(("cos", "sin"), (TOKENS, DIM))
PICTURES = dict.fromkeys("ucp", (2, 4, 6, 6))
SCALES = {"guidance_scale": 5.0, "pag_scale": 3.0}
DEGRADE = {"map_size": (2, 2), "clean": (1.1, -0.4), "noise": (0.3, 0.8)}


def _combined(run, **options):
    def call(x):
        if run is reference.combine_guidance:
            return run(x["u"], x["c"], x["p"], 5.0, 3.0, *options.values())
        return run(x["u"], x["c"], x["p"], **SCALES, **options)

    return call


def _degraded(run):
    received = torch.tensor([[0.5, 1.5, 2.0, 0.1]])
    return lambda x: run(x["sample"], x["output"], received, x["blur"], **DEGRADE)


PA, PA_TRUTH = ops.perturbed_attention, reference.perturbed_attention
BOTH = {"rescale": 0.5, "rescale_mode": "full"}
OPS = {
    "attention": (
        lambda **b: _attention(PA, num_attend=2, num_context=4, **b),
        _attention(PA_TRUTH, num_attend=2, num_context=4),
        _tensors(),
    ),
    "masked": (
        lambda **b: _attention(PA, num_attend=3, num_forked=1, **b),
        _attention(PA_TRUTH, num_attend=3, num_forked=1),
        _tensors(attn_mask=MASK),
    ),
    "blurred": (
        lambda **b: _attention(PA, num_attend=2, perturbation="blur", **b),
        _attention(PA_TRUTH, num_attend=2, perturbation="blur"),
        _tensors(attn_mask=MASK),
    ),
    "soft": (
        lambda **b: _attention(PA, num_attend=2, perturbation="soft", **b),
        _attention(PA_TRUTH, num_attend=2, perturbation="soft"),
        _tensors(attn_mask=MASK, strength=(HEADS,)),
    ),
    "in place": (
        lambda **b: _attention(ops.perturbed_attention_, num_attend=3, **b),
        _attention(PA_TRUTH, num_attend=3),
        _tensors(attn_mask=MASK),
    ),
    "noisy": (
        lambda **b: _attention(ops.noisy_attention, clock=CLOCK, **b),
        _attention(reference.noisy_attention, clock=CLOCK),
        _tensors(attn_mask=MASK),
    ),
    "linear": (
        lambda **b: _attention(ops.linear_attention, num_attend=3, num_forked=1, **b),
        _attention(reference.linear_attention, num_attend=3, num_forked=1),
        _tensors(),
    ),
    "received": (
        lambda **b: lambda x: ops.received_attention(x["q"], x["k"], **b),
        lambda x: reference.received_attention(x["q"], x["k"]),
        {name: x for name, x in _tensors().items() if name != "v"},
    ),
    "norm": (
        lambda **b: _norm(lambda *x, **o: ops.qk_norm_rope_(*x, **o, **b)),
        _norm(reference.qk_norm_rope),
        {name: x for name, x in _tensors(**VECTORS, **TABLES).items() if name != "v"},
    ),
    "combine": (
        lambda **b: _combined(ops.combine_guidance, **BOTH, **b),
        _combined(reference.combine_guidance, **BOTH),
        {name: torch.randn(shape) for name, shape in PICTURES.items()},
    ),
    "snf": (
        lambda **b: _combined(ops.combine_guidance, rescale_mode="snf", **b),
        lambda x: reference.combine_guidance(x["u"], x["c"], x["p"], 5.0, 3.0, rescale_mode="snf"),
        {name: torch.randn(shape) for name, shape in PICTURES.items()},
    ),
    "degrade": (
        lambda **b: _degraded(lambda *x, **o: ops.degrade_latents(*x, **o, **b)),
        _degraded(reference.degrade_latents),
        {
            "sample": torch.randn(1, 2, 6, 6),
            "output": torch.randn(1, 2, 6, 6),
            "blur": torch.rand(1, 1, 3, 3).expand(2, 1, 3, 3),
        },
    ),
}
EACH = [(name, tensor) for name, (_, _, tensors) in OPS.items() for tensor in tensors]
by_tensor = pytest.mark.parametrize(("name", "tensor"), EACH)
by_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def _gradient(run, tensors, which, around=contextlib.nullcontext):
    x = {name: value.clone() for name, value in tensors.items()}
    x[which].requires_grad_()
    with around():
        out = run(x)
    if out.requires_grad:
        (out * torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)).sum().backward()
    return x[which].grad


@by_backend
@by_tensor
def test_backward(name, tensor, backend):
    make, truth, tensors = OPS[name]
    wanted = _gradient(truth, tensors, tensor)
    found = _gradient(make(backend=backend), tensors, tensor)
    assert wanted is not None and wanted.norm() > 0
    assert found is not None
    assert relative(found, wanted) < 1e-3
    watched = lambda: FlopCounterMode(display=False)  # noqa: E731
    assert relative(_gradient(make(backend=backend), tensors, tensor, watched), wanted) < 1e-3


_MATH = torch.nn.attention.SDPBackend.MATH


def _tangent(run, tensors, which):
    torch.manual_seed(7)
    direction = torch.randn(tensors[which].shape)
    with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel([_MATH]), torch.no_grad():
        x = {name: value.clone() for name, value in tensors.items()}
        x[which] = forward_ad.make_dual(x[which], direction)
        return forward_ad.unpack_dual(run(x)).tangent


@by_backend
@by_tensor
def test_forward(name, tensor, backend):
    make, truth, tensors = OPS[name]
    wanted = _tangent(truth, tensors, tensor)
    found = _tangent(make(backend=backend), tensors, tensor)
    assert wanted.norm() > 0
    assert found is not None
    assert relative(found, wanted) < 1e-3
