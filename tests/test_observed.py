"""What a call does is observed: its passes, its steps, its guidance."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from observed_steps import (
    COG,
    FLUX,
    HUNYUAN,
    LUMINA,
    QWEN,
    SCALE,
    SD,
    SD3,
    WAN,
    XL,
    built_once,
    denoiser_of,
    layers_of,
    run_call,
    slow_steps,
)
from tiny_hosts import HOSTS

import pag_fast
from pag_fast.models.layer_names import resolve

TRUE_CFG = [FLUX, "FluxImg2ImgPipeline", "FluxInpaintPipeline", HUNYUAN]
APART = [*TRUE_CFG, WAN]
EVERY = [SD, XL, SD3, COG, "LTXPipeline", *APART]


def _check(pipe, name, *, differs=True, **extra):
    """Patched against the truth, with the same arguments; returns how its steps ran."""
    if differs:
        stock = run_call(pipe, name, **extra)
    with slow_steps(pipe, name):
        truth = run_call(pipe, name, **extra)
    assert not differs or relative(truth, stock) > 1e-3, "PAG makes no difference here"
    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE, strict=True):
        assert relative(run_call(pipe, name, **extra), truth) < 1e-5
        return dict(pipe._pag_fast.steps)


# ---- passes ----


def _same_object(kwargs):
    own = {k: v for k, v in kwargs.items() if k.startswith(("prompt_", "pooled_"))}
    return {**own, **{f"negative_{k}": v for k, v in own.items()}}


def _same_values(kwargs):
    return {k: v.clone() for k, v in _same_object(kwargs).items()}


@pytest.mark.parametrize("how", ["others", "none", _same_object, _same_values])
@pytest.mark.parametrize("name", EVERY)
def test_negative_prompts(name, how):
    """The uncond pass is uncond, whatever its prompt is; without CFG there is none."""
    pipe = built_once(name)
    kwargs = tiny_hosts.call_kwargs(name, pipe)
    extra: dict[str, Any] = {}
    if how == "none":
        extra = {key: None for key in kwargs if key.startswith("negative_")}
        extra[HOSTS[name].cfg] = 1.0
    elif how != "others":
        extra = how(kwargs)
    steps = _check(pipe, name, **extra)
    assert sum(steps.values()) == 3


def test_a_negative_prompt_that_is_the_beginning_of_the_prompt():
    """A view: both begin at one place of one storage."""
    pipe = built_once(WAN)
    text = tiny_hosts.call_kwargs(WAN, pipe)["prompt_embeds"]
    _check(pipe, WAN, prompt_embeds=text, negative_prompt_embeds=text[:, :3])


@pytest.mark.parametrize("how", ["others", "none", _same_object, _same_values])
@pytest.mark.parametrize(
    "name", [x for x in (QWEN, "QwenImageImg2ImgPipeline", LUMINA) if x in HOSTS]
)
def test_negative_prompts_where_guidance_is_normalised(name, how):
    """There PAG goes into cond, by the CFG scale of the call."""
    pipe = built_once(name)
    kwargs = tiny_hosts.call_kwargs(name, pipe)
    cfg = 5.0
    if how == "none":
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("negative_")}
        kwargs[HOSTS[name].cfg] = cfg = 1.0
    elif how != "others":
        kwargs = {**kwargs, **how(kwargs)}

    def run():
        kwargs["generator"].manual_seed(0)
        return tiny_hosts.latents(pipe, kwargs)

    attentions = list(resolve(denoiser_of(pipe), layers_of(name)).values())
    with tiny_hosts.slow_pag(pipe, name, attentions, SCALE, cfg):
        truth = run()
    assert relative(truth, run()) > 1e-3
    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE, strict=True):
        assert relative(run(), truth) < 1e-5


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_image_to_image_begins_late(name):
    assert sum(_check(built_once(name), name, steps=4, strength=0.5).values()) == 2


def test_skip_layer_guidance_and_pag():
    """u + g·(c − u) + k·(c − skipped) + s·(c − p), for a part of the steps."""
    for stop in (1.0, 0.5):
        skip = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 4.0}
        window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": stop}
        _check(built_once(SD3), SD3, steps=4, **skip, **window)


def test_dynamic_cfg():
    _check(built_once(COG), COG, use_dynamic_cfg=True)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_rescale(rescale):
    pipe = built_once(SD)
    attentions = list(resolve(pipe.unet, layers_of(SD)).values())
    with tiny_hosts.slow_pag(pipe, SD, attentions, SCALE, 5.0):
        truth = run_call(pipe, SD, guidance_rescale=rescale)
    with pag_fast.patched(pipe, layers_of(SD), pag_scale=SCALE, strict=True):
        assert relative(run_call(pipe, SD, guidance_rescale=rescale), truth) < 1e-5


@pytest.mark.parametrize("name", [SD, XL, WAN])
def test_cfg_turned_off_in_the_middle(name):
    pipe = built_once(name)
    names = {SD: ["prompt_embeds"], XL: ["prompt_embeds", "add_text_embeds", "add_time_ids"]}

    def callback(pipe, i, t, tensors):
        if i != 1:
            return {}
        pipe._guidance_scale = 1.0
        return {key: x.chunk(2)[-1] for key, x in tensors.items()}

    inputs = {"callback_on_step_end_tensor_inputs": names.get(name, [])}
    _check(pipe, name, steps=4, callback_on_step_end=callback, **inputs)


# ---- steps ----

_SCHEDULERS = ["DDIM", "PNDM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "UniPCMultistep"]
_SCHEDULERS += ["EulerAncestralDiscrete", "DDPM"]


@pytest.mark.parametrize("scheduler", _SCHEDULERS)
@pytest.mark.parametrize("name", [SD, "StableDiffusionPAGPipeline"])
def test_schedulers(name, scheduler):
    """With and without ``step_index``, and with two forwards a step."""
    cls = getattr(diffusers, f"{scheduler}Scheduler")
    counts = (1, 3) if scheduler != "PNDM" else (4,)  # its Runge-Kutta steps need more
    if name == SD:
        pipe = built_once(SD)
        before, pipe.scheduler = pipe.scheduler, cls()
        try:
            for steps in counts:
                ran = _check(pipe, SD, steps=steps, differs=steps > 1)
                assert sum(ran.values()) == len(pipe.scheduler.timesteps)
        finally:
            pipe.scheduler = before
        return
    pipe = tiny.build(name)
    pipe.scheduler = cls()
    for steps in counts[-1:]:
        kwargs = functools.partial(tiny.call_kwargs, name, pipe, steps=steps)
        stock = tiny.latents(pipe, kwargs())
        with pag_fast.patched(pipe, "mid", strict=True):
            assert relative(tiny.latents(pipe, kwargs()), stock) < 1e-5


@pytest.mark.parametrize("name", [FLUX, SD3])
def test_two_forwards_a_step_of_flow_matching(name):
    pipe = built_once(name)
    before, pipe.scheduler = pipe.scheduler, diffusers.FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.config.use_dynamic_shifting = False
    own = pipe.scheduler.set_timesteps
    # it takes no sigmas, which these pipelines hand over
    accepts = {"sigmas" in inspect.signature(own).parameters}
    try:
        if accepts == {False} and name == FLUX:
            with pytest.raises(ValueError, match="sigmas"):
                run_call(pipe, name)
            return
        _check(pipe, name)
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("name", [SD, FLUX, WAN])
def test_one_step_and_interruption(name):
    pipe = built_once(name)
    assert sum(_check(pipe, name, steps=1, differs=False).values()) == 1

    def callback(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return {}

    assert sum(_check(pipe, name, steps=4, callback_on_step_end=callback).values()) == 2


def test_an_end_before_the_end():
    ran = _check(built_once(XL), XL, steps=4, denoising_end=0.5)
    assert sum(ran.values()) == 2


@pytest.mark.parametrize("name", [SD, FLUX])
def test_an_error_in_the_middle_and_another_call(name):
    pipe = built_once(name)

    def fail(pipe, i, t, tensors):
        raise RuntimeError("in the middle")

    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE):
        expected = run_call(pipe, name)
        with pytest.raises(RuntimeError, match="in the middle"):
            run_call(pipe, name, callback_on_step_end=fail)
        assert torch.equal(run_call(pipe, name), expected)


# ---- precision ----


@pytest.mark.parametrize("name", [WAN, FLUX, HUNYUAN, SD])
def test_half_precision_loses_no_more_than_stock_does(name):
    """Latents that are fp32 are guided in fp32."""
    wide, narrow = built_once(name), tiny_hosts.build(name, dtype=torch.bfloat16)

    def error(run):
        return relative(run(narrow).double(), run(wide).double())

    def patched(pipe):
        with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE, strict=True):
            return run_call(pipe, name)

    def slow(pipe):
        with slow_steps(pipe, name):
            return run_call(pipe, name)

    assert error(patched) < 1.5 * error(slow)


@pytest.mark.parametrize("name", [WAN, SD])
def test_what_the_scheduler_is_handed_is_as_wide_as_its_latents(name):
    pipe = tiny_hosts.build(name, dtype=torch.bfloat16)
    own, seen = pipe.scheduler.step, []

    def step(noise, t, sample, *args, **kwargs):
        seen.append((noise.dtype, sample.dtype))
        return own(noise, t, sample, *args, **kwargs)

    pipe.scheduler.step = functools.wraps(own)(step)
    pag_fast.patch(pipe, layers_of(name), pag_scale=SCALE)
    run_call(pipe, name)
    narrow = torch.bfloat16
    assert seen == [(torch.float32, torch.float32) if name == WAN else (narrow, narrow)] * 3
