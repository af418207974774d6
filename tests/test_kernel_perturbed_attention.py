"""The Triton kernel of ``perturbed_attention`` in the interpreter, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch, attention_rounding
from pag_fast_kernels import perturbed_attention
from pag_fast_kernels.launch import INTERPRETED, Config, split_head_dim

from pag_fast.ops import reference

# the interpreter multiplies bf16 wrongly, and does not say so
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# in the interpreter, which has no dtypes of its own, half of the combinations
_MIXED = [(torch.float32, 13), (torch.float16, 0)]
MIXED = _MIXED if INTERPRETED else list(itertools.product(DTYPES, (0, 13)))
pytestmark = pytest.mark.usefixtures("launches", "poisoned")

# rows of v, attending rows, forked rows
MIXES = {"cfg": (3, 2, 0), "cfg off": (2, 1, 0), "fork": (2, 2, 1), "all attend": (2, 2, 0)}
MIXES["none attends"] = (2, 0, 0)


def _inputs(dtype, rows, tokens, heads, dim):
    return [torch.randn(rows, tokens, heads, dim).to(dtype) for _ in range(3)]


def _check(q, k, v, *, num_attend, num_context=0, num_forked=0, config=None, bias=None, **variant):
    if not num_context and not variant:
        q, k = q[:num_attend], k[:num_attend]
    out = v.new_empty((len(v) + num_forked, *v.shape[1:]))
    scale = v.shape[-1] ** -0.5
    mix = {"num_attend": num_attend, "num_context": num_context, "num_forked": num_forked}
    mix |= variant
    key_bias = None if bias is None else bias.expand(len(q), v.shape[2], v.shape[1])
    perturbed_attention(q, k, v, out, scale=scale, config=config, key_bias=key_bias, **mix)
    mask = None if bias is None else key_bias[:, :, None]
    wide = None if mask is None else mask.double()
    truth = reference.perturbed_attention(q.double(), k.double(), v.double(), attn_mask=wide, **mix)
    same = reference.perturbed_attention(q, k, v, attn_mask=mask, **mix)
    # perturbed rows keep the plain rule
    first = slice(0, num_attend)
    rounding = torch.zeros_like(truth)
    rounding[first] = attention_rounding(
        q[first], k[first], v[first], scale, None if mask is None else mask[first]
    )
    assert_close_as_torch(out, same, truth, rounding)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 40, 64, 72, 80, 88, 96, 128, 160, 256])
def test_head_dims(dtype, dim):
    _check(*_inputs(dtype, 3, 77, 2, dim), num_attend=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 77, 256, *([] if INTERPRETED else [1023, 1024])])
def test_lengths(dtype, tokens):
    _check(*_inputs(dtype, 2, tokens, 1, 64), num_attend=1)


def test_a_long_odd_length():
    # the interpreter takes ten seconds for twice as many
    tokens = 1025 if INTERPRETED else 2049
    _check(*_inputs(torch.float16, 2, tokens, 1, 40), num_attend=1)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("dtype", "num_context"), MIXED, ids=str)
def test_row_mixes(dtype, num_context, mix):
    rows, num_attend, num_forked = mix
    inputs = _inputs(dtype, rows, 90, 2, 72)
    _check(*inputs, num_attend=num_attend, num_context=num_context, num_forked=num_forked)


@pytest.mark.parametrize("num_context", [1, 23, 77])
@pytest.mark.parametrize("config", [Config(16, 16, 4, 1), Config(64, 32, 4, 1)], ids=str)
def test_joint_boundaries(num_context, config):
    """Text begins in the middle of a block of keys, whatever the block."""
    inputs = _inputs(torch.float32, 2, 40 + num_context, 1, 64)
    _check(*inputs, num_attend=1, num_context=num_context, config=config)


@pytest.mark.parametrize("num_context", [0, 13])
def test_strided_and_sliced(num_context):
    """q, k, v as slices of one fused projection, and of more rows than are used."""
    fused = torch.randn(5, 60, 3, 2, 64)
    q, k, v = fused[1:4].unbind(2)
    assert not q.is_contiguous()
    _check(q, k, v, num_attend=2, num_context=num_context)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("dtype", "num_context"), MIXED, ids=str)
@pytest.mark.parametrize("perturbation", ["soft", "blur"])
def test_other_perturbations(perturbation, dtype, num_context, mix):
    # a head dimension that is a power of two, and one in two parts
    dim = 32 if dtype == torch.float32 else 80
    rows, num_attend, num_forked = mix
    strength = torch.tensor([0.0, 0.3, 1.0]) if perturbation == "soft" else None
    _check(
        *_inputs(dtype, rows, 75, 3, dim),
        num_attend=num_attend,
        num_context=num_context,
        num_forked=num_forked,
        perturbation=perturbation,
        strength=strength,
    )


def test_soft_identity_at_its_ends():
    """λ = 0 is attention, λ = 1 is the identity, without any rounding."""
    q, k, v = _inputs(torch.float32, 2, 50, 2, 40)
    out = _check(q, k, v, num_attend=1, perturbation="soft", strength=torch.tensor([0.0, 1.0]))
    assert torch.equal(out[1, :, 1], v[1, :, 1])
    attending = _check(q, k, v, num_attend=2)
    assert torch.equal(out[1, :, 0], attending[1, :, 0])


def test_blur_gives_every_image_token_the_same():
    out = _check(*_inputs(torch.float32, 2, 300, 2, 40), num_attend=1, perturbation="blur")
    assert torch.equal(out[1], out[1, :1].expand_as(out[1]))


@pytest.mark.parametrize("perturbation", ["identity", "blur"])
@pytest.mark.parametrize("num_context", [0, 13])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_key_bias(mix, num_context, perturbation):
    """Some keys hidden entirely, the first block of them among these."""
    rows, num_attend, num_forked = mix
    bias = torch.randn(1, 2, 90)
    if not num_context:
        bias[:, 1, :40] = float("-inf")
    _check(
        *_inputs(torch.float32, rows, 90, 2, 32),
        num_attend=num_attend,
        num_context=num_context,
        num_forked=num_forked,
        bias=bias,
        config=Config(32, 32, 4, 1),
        **({} if perturbation == "identity" else {"perturbation": perturbation}),
    )


@pytest.mark.parametrize("num_context", [0, 13])
@pytest.mark.parametrize("perturbation", ["identity", "blur"])
def test_rows_whose_keys_are_all_hidden_are_zero(perturbation, num_context):
    """As in PyTorch's attention, whose softmax of nothing is 0."""
    q, k, v = _inputs(torch.float32, 2, 90, 3, 32)
    bias = torch.zeros(2, 3, 90)
    bias[:, 1] = float("-inf")
    out = torch.empty_like(v)
    mix = {"num_attend": 1, "num_context": num_context, "perturbation": perturbation}
    perturbed_attention(q, k, v, out, scale=0.2, key_bias=bias, **mix)
    expected = F.scaled_dot_product_attention(
        *(x[:1].transpose(1, 2) for x in (q, k, v)), attn_mask=bias[:1, :, None], scale=0.2
    ).transpose(1, 2)
    assert torch.equal(expected[:, :, 1], torch.zeros_like(expected[:, :, 1]))
    assert torch.allclose(out[:1], expected, atol=1e-6)
    if perturbation == "blur" or num_context:
        assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    """The largest score is taken before scaling."""
    q, k, v = _inputs(torch.float32, 2, 75, 2, 32)
    out = torch.empty_like(v)
    perturbed_attention(q, k, v, out, num_attend=1, num_context=13, scale=scale)
    mix = {"num_attend": 1, "num_context": 13, "scale": scale}
    assert torch.allclose(out, reference.perturbed_attention(q, k, v, **mix), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [36, 40])
def test_rows_that_do_not_begin_on_16_bytes(dtype, dim):
    """Odd strides, and an address that is not aligned."""
    q, k, v = (torch.randn(3, 50, 2, dim + 3).to(dtype)[..., 1 : dim + 1] for _ in range(3))
    _check(q, k, v, num_attend=2)


def test_identity_rows_are_bitwise_v():
    q, k, v = _inputs(torch.float16, 3, 50, 2, 40)
    out = _check(q, k, v, num_attend=2)
    assert torch.equal(out[2], v[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype):
    q, k, v = _inputs(dtype, 2, 40, 2, 64)
    _check(q * 30, k * 30, v, num_attend=1)
    _check(q * 30, k * 30, v, num_attend=1, num_context=9)


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_split_head_dim(dim, launches):  # noqa: F811
    launches.append("none needed")
    a, b = split_head_dim(dim)
    assert a + b >= dim
    assert b == 0 or a < dim
    for part in {a, b} - {0}:
        assert part >= 16
        assert part & (part - 1) == 0
    assert a + b <= 1 << max(4, (dim - 1).bit_length())
