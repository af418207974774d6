"""Callbacks that leave some of the pictures in a batch: those that look good, for example."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
SD3, SD3_IMAGE = "StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"
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


@pytest.mark.parametrize(("cfg", "pictures"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("name", [SD3, SD3_IMAGE])
def test_embeddings_without_a_row_for_each_picture(name, pictures, cfg):
    """SD3 repeats none that are given: stock takes other pictures' rows for perturbed ones."""
    pipe = tiny.build(name)

    def run(rows):
        kwargs = tiny.call_kwargs(name, pipe, steps=2, cfg=cfg)
        kwargs["num_images_per_prompt"] = pictures // rows
        for key in [key for key in kwargs if "embeds" in key]:
            kwargs[key] = kwargs[key].repeat_interleave(rows, 0)
        return tiny.latents(pipe, kwargs)

    assert len(run(1)) == pictures
    stock = run(pictures)
    pag_fast.patch(pipe, strict=True)
    with pytest.raises(ValueError, match=f"branches of {pictures} pictures.*given"):
        run(1)
    # what the sentence says works
    assert relative(run(pictures), stock) < 1e-5
