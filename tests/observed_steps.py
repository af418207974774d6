"""What is observed of a call: pipelines without PAG, and the truth of their steps.

The truth is a stock pipeline whose scheduler is handed ``noise + s·(cond − perturbed)``, both from
forwards of their own: nothing in it knows of passes, arguments or CFG scales.
"""

from __future__ import annotations

import contextlib
import functools

import tiny_hosts
import torch
from tiny_hosts import HOSTS

from pag_fast.models.layer_names import resolve

SD, XL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"
SD3, WAN, QWEN = "StableDiffusion3Pipeline", "WanPipeline", "QwenImagePipeline"
LUMINA, COG, HUNYUAN = "Lumina2Pipeline", "CogVideoXPipeline", "HunyuanVideoPipeline"
SCALE = 3.0


@functools.cache
def built_once(name):
    return tiny_hosts.build(name)


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def layers_of(name):
    return HOSTS[name].layers["middle"]


def run_call(pipe, name, **extra):
    steps = extra.pop("steps", 3)
    kwargs = {**tiny_hosts.call_kwargs(name, pipe, steps=steps), **extra}
    return tiny_hosts.latents(pipe, {k: v for k, v in kwargs.items() if v is not None})


@contextlib.contextmanager
def slow_steps(pipe, name, scale=SCALE):
    """``pipe`` with PAG at its scheduler; yields the number of steps so far, in a list."""
    model, scheduler, spec = denoiser_of(pipe), pipe.scheduler, HOSTS[name]
    own, own_step, calls, steps = model.forward, scheduler.step, [], [0]
    attentions = list(resolve(model, layers_of(name)).values())
    sign = -1.0 if name == LUMINA else 1.0  # it turns predictions round

    def forward(*args, **kwargs):
        call = {**dict(zip(tiny_hosts.inspect_parameters(model), args, strict=False)), **kwargs}
        out = own(**call)
        calls.append((call, out[0]))
        return out

    def step(noise, t, sample, *args, **kwargs):
        call, prediction = calls[0]  # diffusers runs cond first
        calls.clear()
        steps[0] += 1
        inputs = call["sample" if "sample" in call else "hidden_states"]
        frames = inputs.shape[2] if "sample" in call and inputs.ndim == 5 else 1
        if inputs.shape[0] == 2 * sample.shape[0]:
            rows = inputs.shape[0]
            call = {k: tiny_hosts.rows_of(k, v, rows, frames, 2, 1) for k, v in call.items()}
            prediction = prediction.chunk(2)[1]
        lengths, image = tiny_hosts.text_and_image(name, call)
        with tiny_hosts.perturbing(attentions, spec.text, lengths, image), torch.no_grad():
            difference = prediction - own(**call)[0]
        noise = noise + sign * scale * difference.to(noise.dtype)
        return own_step(noise, t, sample, *args, **kwargs)

    model.forward, scheduler.step = forward, functools.wraps(own_step)(step)
    try:
        yield steps
    finally:
        del model.forward, scheduler.step
