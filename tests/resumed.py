"""Stock pipelines whose guidance is resumed: built once, called, and patched without PAG."""

from __future__ import annotations

import functools

import tiny_hosts
import tiny_ltx2

import pag_fast

SD3, LTX2 = "StableDiffusion3Pipeline", "LTX2Pipeline"
SKIP = {
    "skip_guidance_layers": [3, 4],
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
    "skip_layer_guidance_scale": 3.0,
}


@functools.lru_cache(maxsize=4)
def resumed_pipe(name):
    return tiny_hosts.build(name) if name == SD3 else tiny_ltx2.build(name)


def _kwargs(name, pipe, **more):
    if name == SD3:
        return tiny_hosts.call_kwargs(name, pipe, **{"steps": 4, **SKIP, **more})
    return tiny_ltx2.call_kwargs(name, **more)


def resumed_latents(name, pipe, **more):
    made = tiny_hosts if name == SD3 else tiny_ltx2
    return made.latents(pipe, _kwargs(name, pipe, **more))


def patched_guidance(name, pipe, **options):
    without_pag = {"layers": "blocks.1", "pag_scale": 0.0} if name == SD3 else {}
    return pag_fast.patched(pipe, **without_pag, **options)
