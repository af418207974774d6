"""Users of one model: pipelines that share it, and their calls."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import diffusers
import tiny
import tiny_hosts
from shallow import build

import pag_fast

SD, PAG, FLUX = "StableDiffusionPipeline", "StableDiffusionPAGPipeline", "FluxPipeline"
STEPS = 3


def _module(name):
    return tiny if name in tiny.PIPELINES else tiny_hosts


def run_call(pipe, name=SD, **extra):
    module = _module(name)
    extra.setdefault("steps", STEPS)
    out = pipe(**module.call_kwargs(name, pipe, **extra))
    return out.images


def sibling_of(pipe, name=SD, **parts):
    cls = getattr(diffusers, name)
    known = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **parts}
    extra = {"requires_safety_checker": False} if "safety_checker" in known else {}
    if name == PAG:
        extra["pag_applied_layers"] = ["mid"]
    made = cls(**known, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def _layer(name):
    return [r"single_transformer_blocks\.1\."] if name == FLUX else ["mid"]


def patched_on(pipe, name=SD, **options):
    if name == PAG:
        return pag_fast.patch(pipe, "mid", **options)
    return pag_fast.patch(pipe, _layer(name), pag_scale=2.0, **options)


def run_once(callback, step=0):
    """A callback that runs ``callback()`` behind one step."""

    def on_step_end(pipe, i, t, tensors):
        if i == step:
            callback()
        return {}

    return {"callback_on_step_end": on_step_end}


def in_thread(run):
    """What ``run()`` returns in a thread of its own; its error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(120)


def two_patched(names=(SD, PAG)):
    first = build(names[0])
    second = sibling_of(first, names[1])
    alone = []
    for pipe, name in zip((first, second), names, strict=True):
        patched_on(pipe, name)
        alone.append(run_call(pipe, name))
        pag_fast.unpatch(pipe)
    for pipe, name in zip((first, second), names, strict=True):
        patched_on(pipe, name)
    return (first, second), alone
