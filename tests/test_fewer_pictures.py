"""Callbacks that leave some of the pictures in a batch: those that look good, for example."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
ANIMATED, HOST = "AnimateDiffPAGPipeline", "StableDiffusionPipeline"
INPUTS = {
    XL: ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"],
    HOST: ["latents", "prompt_embeds"],
}


def _leave(have, want):
    def callback(pipe, step, timestep, kwargs):
        if step:
            return {}
        left = {"latents": kwargs["latents"][:want]}
        for name in kwargs.keys() - {"latents"}:
            x = kwargs[name]
            left[name] = torch.cat([part[:want] for part in x.split(have)])
        return left

    return callback


def _run(name, pipe, have, want, **extra):
    module = tiny_hosts if name == HOST else tiny
    kwargs = module.call_kwargs(name, pipe, batch=have, steps=3, **extra)
    kwargs["callback_on_step_end"] = _leave(have, want)
    kwargs["callback_on_step_end_tensor_inputs"] = INPUTS.get(name, INPUTS[HOST])
    return module.latents(pipe, kwargs)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("counts", [(2, 1), (3, 1), (3, 2), (4, 2), (6, 2)])
def test_stocks_pictures(counts, cfg):
    pipe = tiny.build(SD)
    stock = _run(SD, pipe, *counts, cfg=cfg)
    assert len(stock) == counts[1]
    pag_fast.patch(pipe)
    assert relative(_run(SD, pipe, *counts, cfg=cfg), stock) < 1e-5


def test_with_conditioning_of_sizes():
    pipe = tiny.build(XL)
    stock = _run(XL, pipe, 3, 1)
    pag_fast.patch(pipe)
    assert relative(_run(XL, pipe, 3, 1), stock) < 1e-5


@pytest.mark.parametrize("reuse", [{"every": 3}, {"drift": 100.0}])
@pytest.mark.parametrize("counts", [(2, 1), (3, 2)])
@pytest.mark.parametrize("name", [SD, HOST])
def test_differences_of_other_pictures_are_not_used_again(name, counts, reuse):
    """One that is left has the guidance that it would have had alone, from that step on."""
    module = tiny_hosts if name == HOST else tiny
    pipe = module.build(name)
    layers = tiny_hosts.HOSTS[name].layers["middle"] if name == HOST else None
    with pag_fast.patched(pipe, layers):
        plain = _run(name, pipe, *counts)
    with pag_fast.patched(pipe, layers, reuse=pag_fast.Reuse(**reuse)):
        found = _run(name, pipe, *counts)
    assert found.shape == plain.shape
    # of three steps the third alone uses a difference again, the one of the second
    assert 0 < relative(found, plain) < 0.1
