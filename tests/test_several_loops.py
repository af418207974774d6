"""Subclasses that run a described loop twice in one call, with other arguments the second time."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast

QWEN, LUMINA, SD = "QwenImagePipeline", "Lumina2Pipeline", "StableDiffusionPipeline"
COG, FLUX, SD3 = "CogVideoXPipeline", "FluxPipeline", "StableDiffusion3Pipeline"


def _twice(pipe, **first):
    """``pipe``, whose class runs its call with ``first`` in front of the one asked for."""
    base = type(pipe)

    class Twice(base):
        def __call__(self, **kwargs):
            generator = torch.Generator().manual_seed(9)
            super().__call__(**{**kwargs, "generator": generator, **first})
            return super().__call__(**kwargs)

    pipe.__class__ = Twice
    return pipe


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        (QWEN, {"true_cfg_scale": 2.0}, {"true_cfg_scale": 6.0}),
        (QWEN, {"true_cfg_scale": 1.0}, {"true_cfg_scale": 6.0}),
        (LUMINA, {"guidance_scale": 2.0}, {"guidance_scale": 6.0}),
        (SD, {"guidance_rescale": 0.0}, {"guidance_rescale": 0.7}),
        (COG, {"use_dynamic_cfg": False}, {"use_dynamic_cfg": True}),
        (FLUX, {"num_inference_steps": 1}, {"num_inference_steps": 1}),
        (SD3, {"skip_guidance_layers": None}, {"skip_guidance_layers": [0]}),
    ],
)
def test_a_second_loop_has_its_own_arguments(name, first, second):
    pipe, layers = tiny_hosts.build(name), tiny_hosts.HOSTS[name].layers["middle"]

    def run():
        return tiny_hosts.latents(pipe, {**tiny_hosts.call_kwargs(name, pipe, steps=3), **second})

    with pag_fast.patched(pipe, layers):
        alone = run()
    _twice(pipe, **first)
    with pag_fast.patched(pipe, layers):
        assert relative(run(), alone) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{"reuse": pag_fast.Reuse(every=3)}, {"schedule": pag_fast.Schedule(start=0.2, stop=0.7)}],
    ids=["reuse", "schedule"],
)
@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", SD])
def test_nothing_of_the_first_loop_is_used_again(name, options):
    module = tiny_hosts if name == SD else tiny
    pipe, layers = module.build(name), "mid"

    def run():
        return module.latents(pipe, module.call_kwargs(name, pipe, steps=4))

    with pag_fast.patched(pipe, layers, **options):
        alone = run()
    _twice(pipe, num_inference_steps=7)
    with pag_fast.patched(pipe, layers, **options):
        assert relative(run(), alone) < 1e-6
