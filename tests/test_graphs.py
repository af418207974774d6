"""Graphs of forwards: the same picture, from recordings that know when they are out of date.

What is recorded here are operations on a CPU, on fixed memory, as a CUDA graph has them.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from numerics import relative
from recorded import RecordingCapture
from sweep import spec as sweep
from tiny import PIPELINES, build, call_kwargs, latents
from tiny_hosts import HOSTS
from tiny_hosts import build as build_host
from tiny_hosts import call_kwargs as host_kwargs

import pag_fast
from pag_fast import PatchConfig, Schedule
from pag_fast.perturbations.noise import NoisyScores
from pag_fast.runtime.compiled.capture import NotCapturable

SD = "StableDiffusionPAGPipeline"
NAMES = [
    SD,
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "HunyuanDiTPAGPipeline",
    "AnimateDiffPAGPipeline",
    "KolorsPAGPipeline",
    "PixArtSigmaPAGPipeline",
]
STEPS = 4


def _patch(pipe, layers=None, **options):
    pag_fast.patch(pipe, layers, graphs=True, **options)
    pipe._pag_fast.make_capture = RecordingCapture
    return pipe


def _both(pipe, kwargs, layers=None, **options):
    """Latents without and with graphs; ``kwargs()`` has a new generator every time."""
    pag_fast.patch(pipe, layers, **options)
    expected = latents(pipe, kwargs())
    _patch(pipe, layers, **options)
    return expected, latents(pipe, kwargs())


def _changing(x, weight, running):
    """Views, copies that look like views, writes, and a write beside a result of its own."""
    kept = x.transpose(1, 2).reshape(4, -1) + x.reshape(4, -1)
    normed, _, _ = torch.ops.aten._native_batch_norm_legit(
        kept, None, None, running[0], running[1], True, 0.5, 1e-5
    )
    out = torch.nn.functional.linear(normed, weight)
    out[:, 1:].mul_(2.0)
    return out.view(2, 2, -1).flatten(1), torch.empty(0)


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_recorded_is_what_runs(inference):
    """In inference mode operations come whole, and a reshape may be a copy."""
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        x, weight = torch.randn(4, 3, 5), torch.randn(7, 15)
        running = torch.zeros(15), torch.ones(15)
        replay, out = RecordingCapture(x.device)(lambda: _changing(x, weight, running))
        before, known = out[0].clone(), running[0].clone()
        x.copy_(torch.randn(4, 3, 5))
        expected = _changing(x, weight, (torch.zeros(15), torch.ones(15)))[0]
    replay()
    assert torch.equal(out[0], expected) and relative(out[0], before) > 0.1
    assert not torch.equal(running[0], known)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_the_same(name):
    pipe = build(name)
    expected, found = _both(pipe, lambda: call_kwargs(name, pipe, steps=STEPS))
    assert relative(found, expected) < 1e-6
    steps, models = pipe._pag_fast.steps, 1 + (getattr(pipe, "controlnet", None) is not None)
    assert steps["captured"] == models and steps["replayed"] == models * (STEPS - 1)
    assert not pipe._pag_fast.fallbacks

    # a second call has a prompt of its own
    def second():
        kwargs = call_kwargs(name, pipe, steps=STEPS)
        return kwargs | {"prompt_embeds": kwargs["prompt_embeds"].flip(-1)}

    again = latents(pipe, second())
    pag_fast.patch(pipe)
    assert relative(again, latents(pipe, second())) < 1e-6


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "WanPipeline", "QwenImagePipeline", "Flux2KleinPipeline"]
)
def test_pipelines_without_pag(name):
    """Passes of their own have graphs of their own."""
    pipe = build_host(name)
    expected, found = _both(
        pipe, lambda: host_kwargs(name, pipe, steps=STEPS), HOSTS[name].layers["middle"]
    )
    assert relative(found, expected) < 1e-6
    assert pipe._pag_fast.steps["captured"] and pipe._pag_fast.steps["replayed"] >= STEPS - 1


@pytest.mark.parametrize(("file", "name"), [("more_images", "BriaFiboPipeline")])
def test_a_model_that_nobody_has_described(file, name):
    """It is traced and compared in the first step, outside of what is recorded."""
    (spec,) = (x for x in import_module(f"sweep.{file}").SPECS if x.name == name)
    pipe = sweep.build(spec)
    pag_fast.patch(pipe, spec.layers)
    expected = sweep.result(spec, pipe, spec.cases[0])
    _patch(pipe, spec.layers)
    for _ in range(2):
        assert relative(sweep.result(spec, pipe, spec.cases[0]), expected) < 1e-6
    steps = pipe._pag_fast.steps
    assert steps["captured"] and steps["replayed"] and not steps["not shared"]
    assert not pipe._pag_fast.fallbacks


OPTIONS = {
    "noise": {"perturbation": NoisyScores(0.5)},
    "schedule": {"schedule": Schedule(stop=0.5)},
    "unkept": {"cache_conditioning": False},
    "unfused": {"fewer_launches": False},
    "unshared": {"share_branches": False},
    "reuse": {"reuse": pag_fast.Reuse(every=2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_other_options(options):
    pipe = build(SD)
    expected, found = _both(pipe, lambda: call_kwargs(SD, pipe, steps=6), **options)
    assert relative(found, expected) < 1e-6 and pipe._pag_fast.steps["replayed"]


def _prompts(pipe, values):
    return {"prompt_embeds": values["prompt_embeds"].roll(1, dims=-1)}


def _prompts_in_place(pipe, values):
    values["prompt_embeds"].mul_(1.5)
    return {}


def _kept_output(pipe, values):
    # nobody has to, but what has been written into is not handed out again
    for invariant in pipe._pag_fast.session._kept.invariants:
        for output in invariant.kept.values():
            output.value.mul_(1.5)
    return {}


def _weights(pipe, values):
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    return {}


def _other_weights(pipe, values):
    layer = pipe.unet.conv_out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)
    return {}


def _freeu(pipe, values):
    pipe.unet.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)
    return {}


def _processor(pipe, values):
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(
        AttnProcessor()
    )
    return {}


CHANGES = [
    _prompts,
    _prompts_in_place,
    _kept_output,
    _weights,
    _other_weights,
    _freeu,
    _processor,
]
UNSEEN = (_kept_output, _processor)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_changes_in_the_middle_of_a_call(change):
    """What a callback changes counts from the next step on."""
    found = []
    for graphs in (False, True):
        pipe = build(SD)
        pag_fast.patch(pipe, graphs=graphs)
        pipe._pag_fast.make_capture = RecordingCapture

        def look(pipe, step, t, values):
            return change(pipe, values) if step == 3 else {}

        kwargs = call_kwargs(SD, pipe, steps=7)
        inputs = ["latents", "prompt_embeds"]
        kwargs |= {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": inputs}
        found.append(latents(pipe, kwargs))
    assert relative(found[1], found[0]) < 1e-6
    unchanged = latents(build(SD), call_kwargs(SD, build(SD), steps=7))
    assert relative(found[0], unchanged) > 1e-5 or change in UNSEEN
    assert pipe._pag_fast.steps["captured"] == 2 and pipe._pag_fast.steps["replayed"] >= 4


def test_latents_written_into_by_the_scheduler():
    """The same tensor arrives in every step, with other values."""
    name = "FluxPipeline"
    pipe = build_host(name)

    class InPlace(type(pipe.scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            out = super().step(model_output, timestep, sample, *args, **kwargs)
            return (sample.copy_(out[0]),)

    def kwargs():
        return host_kwargs(name, pipe, steps=STEPS)

    layers = HOSTS[name].layers["middle"]
    pag_fast.patch(pipe, layers)
    expected = latents(pipe, kwargs())
    pipe.scheduler = InPlace.from_config(pipe.scheduler.config)
    assert relative(latents(_patch(pipe, layers), kwargs()), expected) < 1e-6
    assert pipe._pag_fast.steps["replayed"] >= STEPS - 1


def test_a_lora_scale_counts():
    peft = pytest.importorskip("peft")
    found = []
    for graphs in (False, True):
        pipe = build(SD)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config)
        pag_fast.patch(pipe, graphs=graphs)
        pipe._pag_fast.make_capture = RecordingCapture

        def look(pipe, step, t, values):
            if step == 2:
                for module in pipe.unet.modules():
                    if hasattr(module, "scaling"):
                        module.scaling["default"] *= 3.0
            return {}

        found.append(latents(pipe, call_kwargs(SD, pipe, steps=6) | {"callback_on_step_end": look}))
    assert relative(found[1], found[0]) < 1e-6
    assert pipe._pag_fast.steps["captured"] == 2


def test_hooks_run():
    """A replay would run no hook: with one on the model nothing is replayed, and that is said."""
    pipe, seen = _patch(build(SD)), []
    hook = pag_fast.runtime.compatibility.row_wise(lambda *_: seen.append(1))
    pipe.unet.mid_block.register_forward_hook(hook)
    with pytest.warns(UserWarning, match="no graphs"):
        latents(pipe, call_kwargs(SD, pipe, steps=STEPS))
    assert len(seen) == STEPS and not pipe._pag_fast.steps["replayed"]


def test_what_cannot_be_recorded_runs_as_it_is():
    """The memory is short, or a layer waits for the device: the forward begins once more."""

    class Full(RecordingCapture):
        def __call__(self, run):
            run()
            raise NotCapturable("out of memory")

    pipe = build(SD)
    pag_fast.patch(pipe)
    expected = latents(pipe, call_kwargs(SD, pipe, steps=STEPS))
    _patch(pipe)._pag_fast.make_capture = Full
    with pytest.warns(UserWarning, match="no graphs: out of memory"):
        found = latents(pipe, call_kwargs(SD, pipe, steps=STEPS))
    assert relative(found, expected) < 1e-6
    # the rest of the call does not try again
    assert pipe._pag_fast.fallbacks == {"no graphs: out of memory": STEPS - 1}


def test_a_forward_that_waits_for_the_device():
    capture = RecordingCapture(torch.device("cpu"))
    with pytest.raises(NotCapturable, match="waits"):
        capture(lambda: float(torch.ones(())))


def test_outputs_are_the_callers_own():
    """A pipeline may keep a step's output; the next replay writes elsewhere."""
    pipe, outputs = _patch(build(SD)), []
    kwargs = call_kwargs(SD, pipe, steps=STEPS)
    combine = pipe._apply_perturbed_attention_guidance

    def keep(noise_pred, *args):
        outputs.append((noise_pred, noise_pred.clone()))
        return combine(noise_pred, *args)

    object.__setattr__(pipe, "_apply_perturbed_attention_guidance", keep)
    latents(pipe, kwargs)
    assert len(outputs) == STEPS and all(torch.equal(a, b) for a, b in outputs)


def test_nothing_is_held_behind_a_call():
    import gc
    import weakref

    pipe = _patch(build(SD))
    latents(pipe, call_kwargs(SD, pipe, steps=STEPS))
    tapes = [weakref.ref(tape) for tape in pipe._pag_fast.capture.tapes]
    pipe._pag_fast.capture.tapes.clear()
    gc.collect()
    assert tapes and all(tape() is None for tape in tapes)
    assert "graphs of forwards" in str(pag_fast.explain(pipe, flops=False))


def test_refusals():
    with pytest.raises(ValueError, match="leave out compile"):
        PatchConfig(graphs=True, compile=True)
    pipe = pag_fast.patch(build(SD), graphs=True)
    with pytest.raises(ValueError, match="CUDA device"):
        latents(pipe, call_kwargs(SD, pipe))
    assert SD in PIPELINES
