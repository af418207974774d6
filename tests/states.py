"""A pipeline in each of its states: built, patched, running, in the middle of a forward."""

from __future__ import annotations

import diffusers
import pytest
import shallow
import tiny
import tiny_hosts
from numerics import observing

import pag_fast

SD, PAG, FLUX = "StableDiffusionPipeline", "StableDiffusionPAGPipeline", "FluxPipeline"
SAG, CONTROL = "StableDiffusionSAGPipeline", "StableDiffusionControlNetPipeline"
NAMES = pytest.mark.parametrize("name", [SD, PAG])


def build_pipe(name):
    if name == SAG:
        parts = dict(shallow.build(SD).components)
        pipe = diffusers.StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return shallow.build(name)


def run_pipe(pipe, **extra):
    name = type(pipe).__name__
    module = tiny if name in tiny.PIPELINES else tiny_hosts
    kwargs = module.call_kwargs(SD if name == SAG else name, pipe, **extra)
    return pipe(**kwargs).images


def patch_pipe(pipe, **options):
    name = type(pipe).__name__
    if name == SAG:
        return pag_fast.patch(pipe, **options)
    if name == FLUX:
        options.setdefault("layers", [r"single_transformer_blocks\.1\."])
    options.setdefault("layers", "mid")
    if name != PAG:
        options.setdefault("pag_scale", 2.0)
    return pag_fast.patch(pipe, **options)


def with_callback(run, step=0):
    def callback(pipe, i, t, tensors):
        if i == step:
            run()
        return {}

    return {"callback_on_step_end": callback}


def inner(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v


def in_forward(pipe, run):
    """A call in the middle of whose first forward ``run`` is called."""
    seen = []

    @observing
    def hook(*_):
        if not seen:
            seen.append(1)
            handle.remove()  # a copy of the model would have the hook, too
            run()

    handle = inner(pipe).register_forward_hook(hook)
    try:
        return run_pipe(pipe)
    finally:
        handle.remove()
        assert seen
