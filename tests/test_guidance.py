"""``combine_guidance`` and the scale of a step."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.pipelines.pag.pipeline_pag_sd import rescale_noise_cfg
from numerics import assert_close_as_torch, relative
from torch._dynamo.testing import CompileCounterWithBackend

from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.runtime.guidance import guided_cond, scale_at, timestep_value


def _branches(dtype, *, uncond=True, perturbed=True):
    u, c, p = torch.randn(3, 2, 4, 16, 16, dtype=torch.float64).to(dtype)
    return u if uncond else None, c, p if perturbed else None


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("perturbed", [True, False])
@pytest.mark.parametrize("uncond", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_fp64(dtype, uncond, perturbed, rescale, poisoned):
    branches = _branches(dtype, uncond=uncond, perturbed=perturbed)
    scales = {"guidance_scale": 7.0, "pag_scale": 3.0, "rescale": rescale}
    out = ops.combine_guidance(*branches, **scales)
    wide = [None if b is None else b.double() for b in branches]
    truth = reference.combine_guidance(*wide, **scales)
    # PyTorch in the same dtype is diffusers' own expression
    u, c, p = branches
    same = c if u is None else u + 7.0 * (c - u)
    same = same if p is None else same + 3.0 * (c - p)
    same = rescale_noise_cfg(same, c, rescale) if rescale else same
    assert out.dtype == dtype
    assert_close_as_torch(out, same, truth)


@pytest.mark.parametrize("cfg", [True, False])
def test_reference_equals_diffusers(cfg):
    u, c, p = _branches(torch.float64)
    stock = SimpleNamespace(do_pag_adaptive_scaling=False, pag_scale=3.0)
    stock._get_pag_scale = lambda t: PAGMixin._get_pag_scale(stock, t)
    rows = torch.cat([u, c, p] if cfg else [c, p])
    expected = PAGMixin._apply_perturbed_attention_guidance(stock, rows, cfg, 7.0, 500)
    out = reference.combine_guidance(u if cfg else None, c, p, 7.0, 3.0)
    assert relative(out, expected) < 1e-10


def test_rescale_equals_diffusers():
    u, c, p = _branches(torch.float64)
    plain = reference.combine_guidance(u, c, p, 7.0, 3.0)
    out = reference.combine_guidance(u, c, p, 7.0, 3.0, 0.7)
    assert relative(out, rescale_noise_cfg(plain, c, 0.7)) < 1e-10


# ---- rescale modes ----


def _nodes(u, c, p, g, s, rescale, mode):
    """``pamparamm/sd-perturbed-attention``, ``guidance_utils.py``, written out pixel by pixel."""
    cfg = c if u is None else u + g * (c - u)
    term = s * (c - p)
    if mode == "snf":
        if u is None:
            return cfg + term
        picked = torch.empty_like(c)
        weights = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], dtype=c.dtype) ** 2)
        kernel = torch.outer(weights, weights) / weights.sum() ** 2
        for b, channel in np.ndindex(*c.shape[:2]):
            salient = []
            for x in (cfg - u, term):
                plane = np.pad(x[b, channel].abs().numpy(), 1, mode="reflect")
                height, width = x.shape[-2:]
                blurred = torch.tensor(
                    [
                        [(plane[i : i + 3, j : j + 3] * kernel.numpy()).sum() for j in range(width)]
                        for i in range(height)
                    ]
                )
                salient.append(torch.softmax(blurred.flatten(), 0).reshape(height, width))
            first = salient[0] >= salient[1]
            picked[b, channel] = torch.where(first, (cfg - u)[b, channel], term[b, channel])
        return u + picked
    out = []
    for i in range(len(c)):
        reached = (cfg if mode == "full" else c)[i] + term[i]
        factor = rescale * c[i].std() / reached.std() + (1 - rescale)
        out.append(cfg[i] + term[i] * factor)
    return torch.stack(out)


modes = pytest.mark.parametrize(
    ("mode", "rescale"), [("full", 0.7), ("full", 1.0), ("partial", 0.7), ("snf", 0.0)]
)


@modes
@pytest.mark.parametrize("uncond", [True, False], ids=["cfg", "no cfg"])
def test_modes_are_those_of_comfyuis_nodes(mode, rescale, uncond):
    branches = _branches(torch.float64, uncond=uncond)
    expected = _nodes(*branches, 4.0, 3.0, rescale, mode)
    out = reference.combine_guidance(*branches, 4.0, 3.0, rescale, mode)
    assert relative(out, expected) < 1e-10
    plain = reference.combine_guidance(*branches, 4.0, 3.0)
    assert (relative(out, plain) > 1e-2) == (uncond or mode != "snf")


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 4, 3, 8, 8), (2, 24, 16)], ids=str)
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_modes_against_fp64(dtype, mode, rescale, shape, poisoned):
    if mode == "snf" and len(shape) < 4:
        return
    u, c, p = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    scales = {"guidance_scale": 4.0, "pag_scale": 3.0, "rescale": rescale}
    out = ops.combine_guidance(u, c, p, **scales, rescale_mode=mode)
    wide = u.double(), c.double(), p.double()
    truth = reference.combine_guidance(*wide, 4.0, 3.0, rescale, mode)
    # PyTorch in the same dtype, in the way the nodes are written
    cfg, term = u + 4.0 * (c - u), 3.0 * (c - p)
    if mode == "snf":
        chosen = reference.saliency_fusion(4.0 * (wide[1] - wide[0]), 3.0 * (wide[1] - wide[2]))
        clear = out.double().sub(truth).abs() < 0.1  # elsewhere the two saliencies are a tie
        assert clear.double().mean() > 0.999
        same = torch.where(chosen == 4.0 * (wide[1] - wide[0]), cfg, u + term)
        out, same, truth = (torch.where(clear, x, 0) for x in (out, same, truth))
    else:
        reached = (cfg if mode == "full" else c) + term
        same = cfg + term * reference.rescale_factor(reached, c, rescale)
    assert_close_as_torch(out.to(dtype), same.to(dtype), truth)


def test_pictures_of_a_video_are_fused_one_by_one():
    u, c, p = torch.randn(3, 2, 4, 3, 8, 8, dtype=torch.float64)
    out = reference.combine_guidance(u, c, p, 4.0, 3.0, rescale_mode="snf")
    for frame in range(3):
        branches = (x[:, :, frame] for x in (u, c, p))
        alone = reference.combine_guidance(*branches, 4.0, 3.0, rescale_mode="snf")
        assert torch.equal(out[:, :, frame], alone)


def test_saliency_does_not_underflow():
    """Softmaxes of large values are zero nearly everywhere, and zeros would all be ties."""
    first, second = torch.zeros(2, 1, 1, 8, 8)
    first[..., 0, 0], second[..., 7, 7] = 3000.0, 3000.0
    first[..., 4, 2], second[..., 4, 5] = 20.0, 20.0
    picked = reference.saliency_fusion(first, second)
    assert picked[..., 4, 2] == 20.0 and picked[..., 4, 5] == 20.0
    assert picked[..., 0, 0] == picked[..., 7, 7] == 3000.0


@pytest.mark.parametrize("mode", reference.RESCALE_MODES)
def test_without_a_strength_or_a_perturbed_branch_modes_do_nothing(mode):
    u, c, p = _branches(torch.float32)
    scales = {"guidance_scale": 4.0, "pag_scale": 3.0, "rescale_mode": mode}
    plain = reference.combine_guidance(u, c, p, 4.0, 3.0)
    if mode != "snf":
        assert relative(ops.combine_guidance(u, c, p, **scales), plain) < 1e-6
    else:
        assert relative(ops.combine_guidance(None, c, p, **scales), c + 3.0 * (c - p)) < 1e-6
    rescale = {} if mode in ("snf", "cfg") else {"rescale": 0.7}
    out = ops.combine_guidance(u, c, None, **scales, **rescale)
    assert relative(out, u + 4.0 * (c - u)) < 1e-6


def test_modes_compile_into_one_graph_with_the_same_result():
    u, c, p = _branches(torch.float32)
    for mode, rescale in (("full", 0.7), ("partial", 0.7), ("snf", 0.0)):

        def combine(u, c, p, mode=mode, rescale=rescale):
            return ops.combine_guidance(
                u, c, p, guidance_scale=4.0, pag_scale=3.0, rescale=rescale, rescale_mode=mode
            )

        compiled = torch.compile(combine, fullgraph=True, backend="aot_eager")
        assert relative(compiled(u, c, p), combine(u, c, p)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_mode": "half"}, "Unknown rescale_mode 'half': choose one of 'cfg', 'full'"),
        ({"rescale_mode": "snf", "rescale": 0.7}, "'snf' has no strength: leave rescale=0.7 out"),
    ],
)
def test_bad_modes(options, message):
    with pytest.raises(ValueError, match=message):
        ops.combine_guidance(*_branches(torch.float32), guidance_scale=4, pag_scale=3, **options)


@pytest.mark.parametrize("shape", [(2, 24, 16), (2, 4, 1, 16)], ids=str)
def test_fusion_wants_pictures(shape):
    u, c, p = torch.randn(3, *shape)
    with pytest.raises(ValueError, match=r"it takes latents \[batch, channels, height, width\]"):
        ops.combine_guidance(u, c, p, guidance_scale=4.0, pag_scale=3.0, rescale_mode="snf")


def test_only_cond_is_returned_unchanged_and_not_aliased():
    _, c, _ = _branches(torch.float32)
    out = ops.combine_guidance(None, c, None, guidance_scale=1.0, pag_scale=0.0)
    assert torch.equal(out, c)
    assert out.data_ptr() != c.data_ptr()


def test_strided_branches():
    rows = torch.randn(6, 8, 16, 16)
    u, c, p = rows[:, :4].chunk(3)  # the learned-sigma channels dropped
    out = ops.combine_guidance(u, c, p, guidance_scale=7.0, pag_scale=3.0)
    truth = reference.combine_guidance(*(x.double() for x in (u, c, p)), 7.0, 3.0)
    assert relative(out, truth) < 1e-6


def test_opcheck():
    u, c, p = _branches(torch.float32)
    for branches in ((u, c, p), (None, c, p), (u, c, None), (None, c, None)):
        torch.library.opcheck(
            torch.ops.pag_fast.combine_guidance.default, (*branches, 7.0, 3.0, 0.7, "torch")
        )
        for mode, rescale in (("full", 0.7), ("partial", 0.7), ("snf", 0.0)):
            torch.library.opcheck(
                torch.ops.pag_fast.combine_guidance.default,
                (*branches, 7.0, 3.0, rescale, "torch", mode),
            )


def test_inductor_fuses_it_into_one_kernel():
    from torch._inductor.utils import run_and_get_code

    u, c, p = _branches(torch.bfloat16)

    def combine(u, c, p):
        return ops.combine_guidance(u, c, p, guidance_scale=7.0, pag_scale=3.0)

    out, (code,) = run_and_get_code(torch.compile(combine, fullgraph=True), u, c, p)
    assert len(re.findall(r"^cpp_fused\w* = async_compile", code, re.MULTILINE)) == 1
    assert torch.allclose(out.float(), combine(u, c, p).float(), rtol=1e-2)


def test_new_scales_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    u, c, p = _branches(torch.float32)

    @torch.compile(fullgraph=True, backend=counter)
    def combine(u, c, p, g, s):
        return ops.combine_guidance(u, c, p, guidance_scale=g, pag_scale=s)

    for g, s in ((7.0, 3.0), (5.5, 2.0), (4.0, 1.25), (3.0, 0.5), (2.5, 0.25)):
        expected = reference.combine_guidance(u, c, p, g, s)
        assert relative(combine(u, c, p, g, s), expected) < 1e-6
    # the first other value turns the floats into inputs, after that nothing changes any more
    assert counter.frame_count <= 2


def test_branches_must_fit():
    u, c, p = _branches(torch.float32)
    with pytest.raises(ValueError, match="uncond must have the shape of cond"):
        ops.combine_guidance(u[:1], c, p, guidance_scale=7.0, pag_scale=3.0)


# ---- PAG inside of CFG ----


@pytest.mark.parametrize("perturbed", [True, False], ids=["pag", "no pag"])
@pytest.mark.parametrize(
    ("mode", "rescale"), [("cfg", 0.0), ("cfg", 0.7), ("full", 0.7), ("partial", 0.7), ("snf", 0.0)]
)
@pytest.mark.parametrize("g", [0.5, 1.0, 5.0])
def test_cfg_of_the_guided_cond_is_the_combination(g, mode, rescale, perturbed):
    u, c, p = _branches(torch.float64, perturbed=perturbed)
    options = {"rescale": rescale, "rescale_mode": mode}
    expected = reference.combine_guidance(u, c, p, g, 3.0, **options)
    inner = guided_cond(u, c, p, g, 3.0, **options)
    assert relative(u + g * (inner - u), expected) < 1e-10
    inner = guided_cond(u, c, p, g - 1.0, 3.0, **options, from_cond=True)
    assert relative(inner + (g - 1.0) * (inner - u), expected) < 1e-10
    without = guided_cond(None, c, p, None, 3.0, **options)
    expected = reference.combine_guidance(None, c, p, 1.0, 3.0, **options)
    assert relative(without, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mode", "rescale"), [("cfg", 0.0), ("cfg", 0.7), ("full", 0.7)])
def test_error_of_the_guided_cond(dtype, mode, rescale):
    u, c, p = _branches(dtype)
    options = {"rescale": rescale, "rescale_mode": mode}
    truth = guided_cond(u.double(), c.double(), p.double(), 5.0, 3.0, **options)
    same = u + (reference.combine_guidance(u, c, p, 5.0, 3.0, **options) - u) / 5.0
    assert_close_as_torch(guided_cond(u, c, p, 5.0, 3.0, **options), same, truth)


def test_the_guided_cond_of_a_model_that_is_called_without_uncond():
    u, c, p = _branches(torch.float64)
    for options in ({}, {"rescale": 0.7, "rescale_mode": "partial"}):
        alone = guided_cond(None, c, p, 5.0, 3.0, **options)
        assert relative(alone, guided_cond(u, c, p, 5.0, 3.0, **options)) < 1e-12
    for mode, rescale in (("cfg", 0.7), ("full", 0.7), ("snf", 0.0)):
        with pytest.raises(ValueError, match=f"rescale_mode='{mode}' needs the unconditional"):
            guided_cond(None, c, p, 5.0, 3.0, rescale=rescale, rescale_mode=mode)
    with pytest.raises(ValueError, match=r"guidance_scale=-1\.0 leaves nothing of the conditional"):
        guided_cond(u, c, p, -1.0, 3.0, from_cond=True)


# ---- the scale of a step ----


def _pipe(scale, adaptive, timesteps=None):
    scheduler = SimpleNamespace(timesteps=timesteps)
    return SimpleNamespace(
        pag_scale=scale,
        pag_adaptive_scale=adaptive,
        do_pag_adaptive_scaling=adaptive > 0 and scale > 0,
        scheduler=scheduler,
    )


@pytest.mark.parametrize("adaptive", [0.0, 0.002, 0.02, 0.2])
@pytest.mark.parametrize("t", [999, 850, 500, 1])
def test_scale_equals_diffusers(adaptive, t):
    pipe = _pipe(3.0, adaptive)
    expected = PAGMixin._get_pag_scale(pipe, t)
    assert scale_at(pipe, torch.tensor(t), {}) == pytest.approx(expected)
    # a batched timestep, where diffusers' comparison raises
    assert scale_at(pipe, torch.full((6,), t), {}) == pytest.approx(expected)


def test_scale_is_never_negative():
    assert scale_at(_pipe(-1.0, 0.0), 10, {}) == 0.0
    assert "signal_scale < 0" in inspect.getsource(PAGMixin._get_pag_scale)


def test_a_device_timestep_is_looked_up_on_the_host():
    """No ``.item()`` on the step's own tensor: meta tensors have no value to ask for."""
    steps = torch.empty(5, dtype=torch.int64, device="meta")
    pipe = _pipe(3.0, 0.01, steps)
    cache = {"timesteps": steps, "host": [900, 700, 500, 300, 100]}
    for index, value in enumerate(cache["host"]):
        assert timestep_value(pipe, steps[index].expand(6), cache) == value
