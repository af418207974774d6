"""Writes into weights through ``.data`` leave no trace: what is kept is computed again, in turn."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents
from tiny_sag import build_sag, sag_kwargs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pag_fast
from pag_fast.analysis.kernel_counts import counted
from pag_fast.runtime.access.instance_patch import InstancePatch
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sharing.conditioning_cache import ConditioningCache, Invariant, invariant_modules
from pag_fast.sharing.rows import BranchState
from pag_fast.sharing.spot_checks import SpotChecks
from pag_fast.sharing.threads import HERE

SD, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
CONTROL = "StableDiffusionControlNetPAGPipeline"
KEY = "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k"
PLACES = [
    (SD, "unet", KEY),
    (SD3, "transformer", "context_embedder"),
    (CONTROL, "controlnet", "controlnet_cond_embedding"),
    (CONTROL, "unet", KEY),
]
TOLD = "written through .data in the middle of the call"


def _scale(module, factor):
    for parameter in module.parameters():
        parameter.data.mul_(factor)


def _call(name, pipe, part, place, factor, steps=None):
    """A call in whose second step somebody writes; long enough for every module to have a turn."""
    module = getattr(pipe, part).get_submodule(place)
    steps = steps or len(invariant_modules(getattr(pipe, part))) + 3

    def write(pipe, step, timestep, tensors):
        if step == 1:
            before = [(p._version, p.data_ptr()) for p in module.parameters()]
            _scale(module, factor)
            assert [(p._version, p.data_ptr()) for p in module.parameters()] == before
        return tensors

    return call_kwargs(name, pipe, steps=steps, callback_on_step_end=write)


@pytest.mark.parametrize(("name", "part", "place"), PLACES)
def test_a_write_is_told(name, part, place):
    pipe = pag_fast.patch(build(name))
    with pytest.warns(UserWarning, match=rf"weights of {place}, .* were {TOLD}"):
        latents(pipe, _call(name, pipe, part, place, 1.01))
    # the next call begins with what there is now
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, call_kwargs(name, pipe, steps=4))


@pytest.mark.parametrize(("name", "part", "place"), PLACES)
def test_a_write_is_an_error_if_strict(name, part, place):
    pipe = pag_fast.patch(build(name), strict=True)
    with pytest.raises(ValueError, match=TOLD):
        latents(pipe, _call(name, pipe, part, place, 1.01))
    latents(pipe, call_kwargs(name, pipe, steps=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_write_in_half_precision_is_told(dtype):
    pipe = pag_fast.patch(build(SD).to(dtype), strict=True)
    kwargs = _call(SD, pipe, "unet", KEY, 1.02)
    with pytest.raises(ValueError, match=TOLD):
        latents(pipe, _in(kwargs, dtype))


def test_a_write_with_nothing_kept_counts_and_is_nobodys_business():
    stock = build(SD)
    expected = latents(stock, _call(SD, stock, "unet", KEY, 9.0, steps=4))
    pipe = pag_fast.patch(build(SD), strict=True, cache_conditioning=False)
    assert relative(latents(pipe, _call(SD, pipe, "unet", KEY, 9.0, steps=4)), expected) < 1e-5
    plain = latents(stock, call_kwargs(SD, stock, steps=4))
    assert relative(plain, expected) > 1e-3


def test_a_write_during_self_attention_guidance_is_told():
    pipe = pag_fast.patch(build_sag())
    module = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")

    def write(step, timestep, x):
        if step == 1:
            _scale(module, 1.01)

    with pytest.warns(UserWarning, match=TOLD):
        pipe(
            **sag_kwargs(num_inference_steps=len(invariant_modules(pipe.unet)) + 3, callback=write)
        )


# ---- no false alarms ----


def _in(kwargs, dtype):
    return {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in kwargs.items()
    }


@pytest.fixture
def checks(monkeypatch):
    """Names of what has been checked in the latest call."""
    names, ask = [], SpotChecks.differing

    def differing(self):
        names.extend(name for name, *_ in self._noted)
        return ask(self)

    monkeypatch.setattr(SpotChecks, "differing", differing)
    return names


_MODELS = {spec.model + " with a ControlNet" * spec.controlnet: n for n, spec in PIPELINES.items()}
_HOSTS = [name for name, spec in tiny_hosts.HOSTS.items() if spec.brings_a_model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*_MODELS.values(), *_HOSTS])
def test_no_false_alarm(name, dtype, checks):
    made = tiny_hosts if name in _HOSTS else tiny
    pipe = made.build(name).to(dtype)
    layers = tiny_hosts.HOSTS[name].layers["middle"] if name in _HOSTS else None
    pag_fast.patch(pipe, layers, strict=True)
    # some pipelines make one video at a time
    batch = tiny_hosts.HOSTS[name].batches[-1] if name in _HOSTS else 2
    kwargs = made.call_kwargs(name, pipe, batch=batch, steps=5)
    made.latents(pipe, _in(kwargs, dtype))
    assert checks, "nothing was checked"


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"])
def test_double_precision(name, checks):
    pipe = tiny.build(name).to(torch.float64)

    def run():
        return tiny.latents(pipe, _in(tiny.call_kwargs(name, pipe, steps=5), torch.float64))

    stock = run()
    pag_fast.patch(pipe, strict=True)
    assert relative(run(), stock) < 1e-12
    assert checks, "nothing was checked"


def test_what_has_overflowed_is_no_alarm():
    state, layer = BranchState(), nn.Linear(2, 2, bias=False)
    layer.weight.data.fill_(float("inf"))
    assert _two_steps(state, layer, lambda: None) == []
    layer.weight.data.fill_(1.0)
    assert _two_steps(state, layer, lambda: layer.weight.data.fill_(float("nan"))) == ["Linear"]


# ---- turns, and what they cost ----


def test_every_module_has_its_turn_from_call_to_call(checks):
    pipe = pag_fast.patch(build(SD))
    everything = invariant_modules(pipe.unet)
    for _ in range(len(everything)):
        latents(pipe, call_kwargs(SD, pipe, steps=3))
    # two steps of each call have something kept
    assert Counter(checks) == Counter(dict.fromkeys(everything, 2))


@row_wise
class Waits(TorchDispatchMode):
    """How often the host asks a tensor for its values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device():
    pipe = build(SD)

    def waits(steps):
        with Waits() as seen:
            latents(pipe, call_kwargs(SD, pipe, steps=steps))
        return seen.count

    pag_fast.patch(pipe, cache_conditioning=False)
    a_step = waits(6) - waits(4)
    pag_fast.patch(pipe)
    assert waits(6) - waits(4) == a_step


def test_launches_of_a_check():
    """The module's own, a difference and two norms."""
    state, layer = BranchState(), nn.Linear(3, 3)
    counts = []

    def step(run):
        with counted() as launches:
            run()
        counts.append(launches.total)

    _two_steps(state, layer, lambda: None, around=step)
    assert counts == [1, 4]


def _two_steps(state, layer, between, around=lambda run: run()):
    """Names that are told after two steps on the same input, with ``between`` in between."""
    invariant = Invariant(state, layer)
    cache = ConditioningCache(state, [invariant])
    patch = InstancePatch([(vars(layer), "forward", invariant)])
    x = torch.randn(2, layer.in_features)

    def run():
        with torch.no_grad():
            outputs.append(layer(x))

    outputs = []
    for same in (False, True):
        cache.advance(x, same=same)
        state.thread = HERE.me
        before = patch.on()
        around(run)
        patch.off(before)
        state.thread = None
        if not same:
            between()
    assert torch.equal(outputs[1], layer(x)) or not torch.isfinite(outputs[1]).all()
    (kept,) = invariant.kept.values()
    assert kept.value is outputs[1], "what is computed again is what is kept"
    return cache.checks.differing()
