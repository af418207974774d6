"""What ops refuse, in a sentence and alike on both backends, and masks of few dimensions."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import relative

from pag_fast import ops
from pag_fast.ops import reference

SHAPE = (2, 12, 2, 8)
by_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def _qkv(shape=SHAPE, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def _attention(shape=SHAPE, dtype=torch.float32, **options):
    q, k, v = _qkv(shape, dtype)
    return ops.perturbed_attention(q, k, v, **({"num_attend": 2} | options))


def _attention_(shape=SHAPE, dtype=torch.float32, **options):
    return ops.perturbed_attention_(*_qkv(shape, dtype), **({"num_attend": 2} | options))


def _soft(**options):
    return _attention(num_attend=1, perturbation="soft", **options)


def _linear(shape=SHAPE, dtype=torch.float32, **options):
    return ops.linear_attention(*_qkv(shape, dtype), num_attend=2, **options)


def _noisy(shape=SHAPE, dtype=torch.float32, **options):
    return ops.noisy_attention(*_qkv(shape, dtype), **({"clock": torch.tensor(1)} | options))


def _received(shape=SHAPE, dtype=torch.float32, **options):
    return ops.received_attention(*_qkv(shape, dtype)[:2], **options)


def _norm(shape=SHAPE, dtype=torch.float32, **options):
    q, k, _ = _qkv(shape, dtype)
    k = k.to(options.pop("other", dtype))
    rest = {"q_affine": None, "k_affine": None, "rotary": None} | options
    return ops.qk_norm_rope_(q, k, **rest)


def _combine(dtypes, **options):
    u, c, p = (torch.ones(2, 4, 6, 6, dtype=dtype) for dtype in dtypes)
    return ops.combine_guidance(u, c, p, guidance_scale=5.0, pag_scale=3.0, **options)


def _degrade(dtype=torch.float32, blur=None, **options):
    x = torch.randn(2, 4, 6, 6).to(dtype)
    blur = reference.gaussian_kernel(4, 3) if blur is None else blur
    sizes = {"map_size": (2, 2), "clean": (1.0, -0.5), "noise": (0.2, 0.9)}
    return ops.degrade_latents(x, x, torch.ones(2, 4), blur, **sizes, **options)


FLOAT, INT = torch.float32, torch.int64
EMPTY = (2, 0, 2, 8)
REFUSED = {
    "strength": (lambda **b: _soft(strength=0.5, **b), "strength must be a tensor"),
    "strengths": (lambda **b: _soft(strength=[0.5, 0.5], **b), "strength must be a tensor"),
    "mask": (lambda **b: _attention(attn_mask=[[0.0]], **b), "attn_mask must be a tensor"),
    "mask in place": (lambda **b: _attention_(attn_mask=[0.0], **b), "attn_mask must be a tensor"),
    "mask of noise": (lambda **b: _noisy(attn_mask=[0.0], **b), "attn_mask must be a tensor"),
    "mask of integers": (
        lambda **b: _attention(attn_mask=torch.ones(12, dtype=INT), **b),
        "boolean or floating-point",
    ),
    "mask of other keys": (
        lambda **b: _attention(attn_mask=torch.ones(2, 1, 1, 11), **b),
        r"must broadcast to .* got \(2, 1, 1, 11\)",
    ),
    "mask of other rows": (
        lambda **b: _attention(attn_mask=torch.ones(5, 1, 1, 12), **b),
        r"must broadcast to .* got \(5, 1, 1, 12\)",
    ),
    "a mask for every query of the mean": (
        lambda **b: _attention(
            num_attend=1, perturbation="blur", attn_mask=torch.ones(12, 12), **b
        ),
        "which keys are seen|says which keys",
    ),
    "clock": (lambda **b: _noisy(clock=3, **b), "clock must be a tensor"),
    "seed": (lambda **b: _noisy(seed=-1, **b), "seed must be an integer from 0"),
    "large seed": (lambda **b: _noisy(seed=2**63, **b), "seed must be an integer from 0"),
    "half a seed": (lambda **b: _noisy(seed=1.5, **b), "seed must be an integer from 0"),
    "head": (lambda **b: _noisy(first_head=-1, **b), "first_head must be an integer from 0"),
    "no tokens": (lambda **b: _attention(EMPTY, **b), "at least one token"),
    "no tokens in place": (lambda **b: _attention_(EMPTY, **b), "at least one token"),
    "no tokens, linear": (lambda **b: _linear(EMPTY, **b), "at least one token"),
    "no tokens, noise": (lambda **b: _noisy(EMPTY, **b), "at least one token"),
    "no tokens, received": (lambda **b: _received(EMPTY, **b), "at least one token"),
    "integers": (lambda **b: _attention(dtype=INT, **b), "floating-point"),
    "integers, linear": (lambda **b: _linear(dtype=INT, **b), "floating-point"),
    "integers, noise": (lambda **b: _noisy(dtype=INT, **b), "floating-point"),
    "integers, received": (lambda **b: _received(dtype=INT, **b), "floating-point"),
    "integers, norm": (lambda **b: _norm(dtype=INT, **b), "floating-point"),
    "integers, cond": (lambda **b: _combine((FLOAT, INT, FLOAT), **b), "cond is torch.int64"),
    "integers, uncond": (lambda **b: _combine((INT, FLOAT, FLOAT), **b), "uncond is torch.int64"),
    "integers, latents": (lambda **b: _degrade(dtype=INT, **b), "floating-point"),
    "k of another dtype": (lambda **b: _norm(other=torch.float16, **b), "one floating-point"),
    "a short weight": (
        lambda **b: _norm(q_affine=(torch.ones(4), None), **b),
        r"q's weight must have one number for each of 8 channels; got shape \(4,\)",
    ),
    "a long bias": (
        lambda **b: _norm(k_affine=(None, torch.ones(16)), **b),
        r"k's bias must have one number for each of 8 channels; got shape \(16,\)",
    ),
}


@by_backend
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, backend):
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call(backend=backend)


MASKS = {
    "keys": lambda: torch.randn(12),
    "hidden keys": lambda: torch.arange(12) != 3,
    "one number": lambda: torch.tensor(0.5),
    "queries and keys": lambda: torch.randn(12, 12),
    "heads": lambda: torch.randn(2, 12, 12),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_few_dimensions(name):
    q, k, v = _qkv()
    mask, clock = MASKS[name](), torch.tensor(1)
    wanted = reference.perturbed_attention(q, k, v, num_attend=2, num_forked=1, attn_mask=mask)
    found = ops.perturbed_attention(q, k, v, num_attend=2, num_forked=1, attn_mask=mask)
    assert relative(found, wanted) < 1e-5
    kept = ops.perturbed_attention_(q, k, v.clone(), num_attend=2, attn_mask=mask)
    assert relative(kept, wanted[:2]) < 1e-5
    found = ops.noisy_attention(q, k, v, clock=clock, attn_mask=mask)
    assert relative(found, reference.noisy_attention(q, k, v, clock=clock, attn_mask=mask)) < 1e-5


def test_a_blur_of_each_channel(launches):  # noqa: F811
    """The kernel has one for all: PyTorch runs it, or it is refused."""
    blur = torch.rand(4, 1, 3, 3)
    torch.manual_seed(0)
    found = _degrade(blur=blur)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    sizes = {"map_size": (2, 2), "clean": (1.0, -0.5), "noise": (0.2, 0.9)}
    wanted = reference.degrade_latents(x, x, torch.ones(2, 4), blur, **sizes)
    assert relative(found, wanted) < 1e-5
    with pytest.raises(ValueError, match="one blur for all channels"):
        _degrade(blur=blur, backend="triton")
    assert not launches
    _degrade(blur=blur[:1].expand(4, 1, 3, 3), backend="triton")
    assert launches


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: _attention((2, 4, 2, 264), backend="triton"), "up to 256 channels, not of 264"),
        (lambda: _linear((2, 4, 2, 136), backend="triton"), "up to 128 channels, not of 136"),
        (lambda: _noisy((2, 4, 2, 72), backend="triton"), "up to 64 channels, not of 72"),
        (lambda: _noisy(attn_mask=torch.ones(12), backend="triton"), "takes no mask"),
        (
            lambda: _attention(num_context=4, attn_mask=torch.ones(2, 1, 1, 12), backend="triton"),
            "no mask with text tokens",
        ),
        (lambda: _received(dtype=torch.float64, backend="triton"), "take fp16, bf16 and fp32"),
    ],
)
def test_a_refusal_names_what_does_not_fit(call, sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*backend='auto' falls back") as caught:
        call()
    assert str(caught.value).count(". ") == 1
