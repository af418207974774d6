"""Calls that fail: the pipeline afterwards is what it was before, patched or unpatched."""

from __future__ import annotations

import re

import pytest
import shallow
import torch
from numerics import observing, relative
from tiny import FAMILIES, build, call_kwargs, latents

import pag_fast


class Injected(Exception):
    pass


def _reached(pipe, name):
    """Names of all modules a call runs through, in every model component."""
    ran, handles = [], []
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                handles.append(
                    module.register_forward_hook(
                        observing(lambda *_, key=(part, path): ran.append(key))
                    )
                )
    pipe(**call_kwargs(name, pipe, steps=1, output_type="pt"))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(ran))


def _of_each_kind(modules, which):
    """The first (0) or the last (-1) of all modules whose paths differ in numbers alone."""
    kinds = {}
    for part, path in modules:
        kinds.setdefault((part, re.sub(r"\d+", "N", path)), []).append((part, path))
    return [found[which] for found in kinds.values()]


# both ways a UNet and a transformer; the others add a kind of module or of call each
_BEFORE, _AFTER = (Injected, "before"), (KeyboardInterrupt, "after")
_WHERE = {
    "StableDiffusionPAGPipeline": [_BEFORE, _AFTER],
    "StableDiffusion3PAGPipeline": [_BEFORE, _AFTER],
    "StableDiffusionControlNetPAGPipeline": [_AFTER],
    "StableDiffusionXLPAGPipeline": [_BEFORE],
    "AnimateDiffPAGPipeline": [_BEFORE],
    "HunyuanDiTPAGPipeline": [_BEFORE],
    "PixArtSigmaPAGPipeline": [_AFTER],
    "SanaPAGPipeline": [_AFTER],
}


@pytest.mark.parametrize(
    ("name", "error", "when"), [(name, *case) for name in FAMILIES for case in _WHERE[name]]
)
def test_error_at_every_module(name, error, when, snapshot):
    """At every module of Stable Diffusion; elsewhere at one of each kind, early or late."""
    if name == FAMILIES[0]:
        pipe = shallow.build(name, pag_applied_layers=["mid", "up_blocks.1"], **shallow.TWO_BLOCKS)
    else:
        pipe = shallow.build(name, pag_applied_layers=shallow.LAYERS[name]["middle"])
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    modules = _reached(pipe, name)
    assert len(modules) > 50
    if (name, when) != (FAMILIES[0], "before"):
        modules = _of_each_kind(modules, 0 if when == "before" else -1)
    before = snapshot(pipe)

    @observing
    def fail(*_):
        raise error("injected")

    for part, path in modules:
        module = getattr(pipe, part).get_submodule(path)
        register = (
            module.register_forward_pre_hook if when == "before" else module.register_forward_hook
        )
        handle = register(fail)
        with pytest.raises(error):
            pipe(**call_kwargs(name, pipe, steps=1, output_type="pt"))
        handle.remove()
        assert snapshot(pipe) == before, f"{part}.{path}"
    patched = latents(pipe, call_kwargs(name, pipe))
    assert relative(patched, stock) < 1e-5
    pag_fast.unpatch(pipe)
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "PixArtSigmaPAGPipeline"])
def test_raising_callback(name, step, snapshot):
    pipe = pag_fast.patch(build(name))
    before = snapshot(pipe)

    def callback(pipe, i, t, tensors):
        if i == step:
            raise Injected
        return tensors

    with pytest.raises(Injected):
        pipe(**call_kwargs(name, pipe, callback_on_step_end=callback))
    assert snapshot(pipe) == before


def test_interrupt_flag():
    """``pipe._interrupt = True`` from a callback: the remaining steps are skipped."""
    name = "StableDiffusionXLPAGPipeline"
    pipe = build(name)

    def callback(pipe, i, t, tensors):
        pipe._interrupt = True
        return tensors

    stock = latents(pipe, call_kwargs(name, pipe, steps=4, callback_on_step_end=callback))
    pag_fast.patch(pipe)
    patched = latents(pipe, call_kwargs(name, pipe, steps=4, callback_on_step_end=callback))
    assert relative(patched, stock) < 1e-5
    assert sum(pipe._pag_fast.steps.values()) == 1


def test_failing_scheduler(snapshot, monkeypatch):
    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))
    before = snapshot(pipe)

    def fail(*args, **kwargs):
        raise Injected

    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(pipe.scheduler, "step", fail)
        pipe(**call_kwargs(name, pipe))
    assert snapshot(pipe) == before


def test_call_inside_a_callback_is_refused(snapshot):
    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))
    before = snapshot(pipe)

    def callback(pipe, i, t, tensors):
        pipe(**call_kwargs(name, pipe))
        return tensors

    with pytest.raises(ValueError, match="already running"):
        pipe(**call_kwargs(name, pipe, callback_on_step_end=callback))
    assert snapshot(pipe) == before


def test_a_shared_unet_is_untouched_after_a_failure():
    """Siblings share modules: what one leaves behind, the other would run."""
    from diffusers import StableDiffusionPipeline

    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    sibling = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    kwargs = call_kwargs(name, pipe, batch=3)
    kwargs.pop("pag_scale")

    def picture():
        kwargs["generator"].manual_seed(0)
        return latents(sibling, kwargs)

    before = picture()

    def fail(pipe, i, t, tensors):
        raise Injected

    with pytest.raises(Injected):
        pipe(**call_kwargs(name, pipe, callback_on_step_end=fail))
    # six rows: a leaked processor would take them for two samples of three branches
    assert torch.equal(picture(), before)
