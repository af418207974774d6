"""Pipelines without PAG, each built once, and their pictures from three separate forwards."""

from __future__ import annotations

import functools

from tiny_hosts import HOSTS, build, latents, slow_pag

from pag_fast.models.layer_names import resolve

SD, FLUX, WAN = "StableDiffusionPipeline", "FluxPipeline", "WanPipeline"
SD3, LUMINA = "StableDiffusion3Pipeline", "Lumina2Pipeline"


@functools.lru_cache(maxsize=2)
def built_host(name):
    return build(name)


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def slow(pipe, name, layers, kwargs, pag_scale=3.0):
    attentions = list(resolve(denoiser_of(pipe), layers).values())
    scale = HOSTS[name].cfg_scale(kwargs)
    with slow_pag(pipe, name, attentions, pag_scale, scale):
        return latents(pipe, kwargs)
