"""Schedulers that have a timestep several times: a forward is at one place for all branches."""

from __future__ import annotations

import diffusers
import pytest
import torch
from built_hosts import SD, SD3, WAN, denoiser_of, slow
from numerics import observing, relative
from shallow import least
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast import CompileConfig, Schedule
from pag_fast.models import registry as models
from pag_fast.perturbations import Branch
from pag_fast.pipelines import registry as pipelines
from pag_fast.runtime.guided import Guided

FACTORS = [1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0, 0.5, 1.0, 0.0, 2.0, 0.75, 1.5]
HUNYUAN = "HunyuanDiTPipeline"
OWN = {"one": (None,), "two": (1.0, 2.0), "three": (0.5, None, 1.5)}


def _built(name, scheduler):
    pipe = build(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def _branches(layers, own):
    return [Branch(layers, "identity", scale) for scale in own]


def _places(asked):
    """Of a function of the steps that was asked for each branch: the index at each forward."""

    def factor(step):
        asked.append((step.index, step.count))
        return FACTORS[step.index]

    return Schedule(per_step=factor)


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize(
    ("name", "scheduler", "extra"),
    [
        (SD, "HeunDiscreteScheduler", {}),
        (SD, "KDPM2AncestralDiscreteScheduler", {}),
        (SD, "PNDMScheduler", {}),
        (HUNYUAN, "PNDMScheduler", {}),
        (SD3, "FlowMatchHeunDiscreteScheduler", {}),
        (WAN, "FlowMatchHeunDiscreteScheduler", {}),
        ("StableDiffusionImg2ImgPipeline", "HeunDiscreteScheduler", {"strength": 0.5}),
        ("StableDiffusion3Img2ImgPipeline", "FlowMatchHeunDiscreteScheduler", {"strength": 0.5}),
    ],
)
def test_every_branch_has_the_scale_of_the_forward(name, scheduler, extra, own):
    """Image-to-image begins at the second of two equal timesteps; HunyuanDiT hands on copies."""
    pipe, layers, asked, calls = _built(name, scheduler), HOSTS[name].layers["middle"], [], []

    def kwargs():
        return call_kwargs(name, pipe, steps=4, **extra)

    whole = sum(3.0 if scale is None else scale for scale in own)
    truth = slow(pipe, name, layers, kwargs(), lambda i: whole * FACTORS[i])
    with pag_fast.patched(pipe, branches=_branches(layers, own), schedule=_places(asked)):
        handle = denoiser_of(pipe).register_forward_hook(observing(lambda *_: calls.append(1)))
        patched = latents(pipe, kwargs())
        handle.remove()
    count = len(calls) // (2 if HOSTS[name].apart else 1)
    assert asked == [(i, count) for i in range(count) for _ in own]
    assert relative(patched, truth) < 1e-5


@pytest.mark.parametrize("window", [{"start": 2}, {"stop": 2}, {"stop": 4, "start": 1}], ids=str)
def test_windows_of_several_branches(window):
    pipe, layers = _built(SD, "HeunDiscreteScheduler"), HOSTS[SD].layers["middle"]
    first, last = window.get("start", 0), window.get("stop", 99)

    def kwargs():
        return call_kwargs(SD, pipe, steps=3)

    truth = slow(pipe, SD, layers, kwargs(), lambda i: 3.0 if first <= i < last else 0.0)
    branches = _branches(layers, (1.0, 2.0))
    with pag_fast.patched(pipe, branches=branches, schedule=Schedule(**window)):
        assert relative(latents(pipe, kwargs()), truth) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Schedule(per_step=lambda step: FACTORS[step.index])},
        {"pag_adaptive_scale": 0.001},
    ],
    ids=["schedule", "adaptive"],
)
@pytest.mark.parametrize(
    ("name", "scheduler"), [(SD, "HeunDiscreteScheduler"), (HUNYUAN, "PNDMScheduler")]
)
def test_looking_ahead_stays_at_the_forward(name, scheduler, options, monkeypatch):
    """Which a session does once more where it has traced its model."""
    ahead, looked = [], Guided._ahead

    def noted(self):
        found = list(looked(self))
        ahead.append((self.loop.step, len(found)))
        return iter(found)

    monkeypatch.setattr(Guided, "_ahead", noted)
    pipe, layers = _built(name, scheduler), HOSTS[name].layers["middle"]
    options = {**options, "branches": _branches(layers, (1.0, 2.0))}
    with pag_fast.patched(pipe, **options):
        plain = latents(pipe, call_kwargs(name, pipe, steps=4))
        assert not ahead
    monkeypatch.setattr(models, "DESCRIPTIONS", ())
    monkeypatch.setattr(pipelines, "PIPELINES", ())
    for _ in range(2):
        with pag_fast.patched(pipe, **options):
            assert relative(latents(pipe, call_kwargs(name, pipe, steps=4)), plain) < 1e-5
    count = len(pipe.scheduler.timesteps)
    assert len(ahead) > 1 and all(step + left == count for step, left in ahead)


def test_compiled_ahead_of_a_window():
    torch._dynamo.reset()
    pipe, layers = least(SD)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    options = {"branches": _branches(layers, (1.0, 2.0)), "schedule": Schedule(start=1, stop=2)}
    with pag_fast.patched(pipe, **options):
        eager = latents(pipe, call_kwargs(SD, pipe, steps=2))
    with pag_fast.patched(pipe, compile=CompileConfig(backend="eager"), **options):
        assert relative(latents(pipe, call_kwargs(SD, pipe, steps=2)), eager) < 1e-5
    torch._dynamo.reset()
