"""``combine_guidance`` and the scale of a step."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.pipelines.pag.pipeline_pag_sd import rescale_noise_cfg
from numerics import assert_close_as_torch, relative
from torch._dynamo.testing import CompileCounterWithBackend

from pag_fast import ops, reference
from pag_fast.guidance import scale_at, timestep_value


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
