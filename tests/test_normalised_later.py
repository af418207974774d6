"""Guidance that is normalised in some steps of a call, and not in others."""

from __future__ import annotations

import pytest
import tiny_hosts
import torch
from numerics import relative
from observed_steps import SCALE, denoiser_of, layers_of
from tiny_hosts.reference import slow_pag

import pag_fast
from pag_fast.models.layer_names import resolve

LTX, ANIMATED = "LTXPipeline", "AnimateDiffSDXLPipeline"


def _run(name, pipe, attribute, values, **extra):
    """A call behind whose second step a callback gives an attribute its second value."""
    first, then = values

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            setattr(pipe, f"_{attribute}", then)
        return {}

    kwargs = tiny_hosts.call_kwargs(name, pipe, steps=4, **extra)
    kwargs |= {attribute: first, "callback_on_step_end": callback}
    return tiny_hosts.latents(pipe, kwargs)


@pytest.mark.parametrize("values", [(0.0, 0.7), (0.7, 0.0), (0.3, 0.9)])
@pytest.mark.parametrize("name", [LTX, ANIMATED])
def test_a_callback_turns_rescale_on_and_off(name, values):
    pipe = tiny_hosts.build(name)
    layers = list(resolve(denoiser_of(pipe), layers_of(name)).values())
    scale = tiny_hosts.HOSTS[name].cfg_scale(tiny_hosts.call_kwargs(name, pipe))
    with slow_pag(pipe, name, layers, SCALE, scale):
        slow = _run(name, pipe, "guidance_rescale", values)
        assert relative(_run(name, pipe, "guidance_rescale", values[:1] * 2), slow) > 1e-4
    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE):
        assert relative(_run(name, pipe, "guidance_rescale", values), slow) < 1e-5


@pytest.mark.parametrize("name", ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"])
def test_there_is_nothing_to_normalise_behind_the_end_of_cfg(name):
    """Z-Image drops uncond at a time, and no step is scaled from there on."""
    pipe = tiny_hosts.build(name)

    def run(normalised):
        kwargs = tiny_hosts.call_kwargs(name, pipe, steps=4)
        kwargs |= {"cfg_truncation": 0.0, "cfg_normalization": normalised, "strength": 0.5}
        return tiny_hosts.latents(pipe, kwargs)

    assert torch.equal(run(0.5), run(False))
    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE, strict=True):
        assert relative(run(0.5), run(False)) < 1e-6
