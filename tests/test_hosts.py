"""PAG added to pipelines that have none: against three separate forwards, and nothing left."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import tiny
import torch
from built_hosts import FLUX, LUMINA, SD, SD3, WAN, built_host, denoiser_of, slow
from numerics import observing, relative
from shallow import LAYERS, family, least
from shallow import build as shallow
from tiny_hosts import HOSTS, build, call_kwargs, latents
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.runtime.compatibility import row_wise
from pag_fast.settings.compile_config import CompileConfig


@functools.lru_cache(maxsize=2)
def _shallow(name):
    return shallow(name)


def _is_first(name):
    spec = HOSTS[name]
    return spec.brings_a_model or (spec.like in tiny.FAMILIES and not spec.base)


def _everywhere():
    """Every pipeline with a fork in the middle and without CFG; of each denoiser one with all."""
    for name, spec in HOSTS.items():
        yield name, "middle", bool(spec.cfg), spec.batches[-1]
        if spec.cfg or spec.swept:
            yield name, "middle", False, 1
        if _is_first(name):
            yield name, "all", True, 1


def _of(name, layers):
    """A pipeline and its layers: the others of a denoiser are shallow, with what fits to it."""
    # the net of HunyuanDiT has a residual for each long skip of the whole model
    whole = _is_first(name) or name == "HunyuanDiTControlNetPipeline"
    if whole or family(name) not in LAYERS:
        return built_host(name), HOSTS[name].layers[layers]
    return _shallow(name), LAYERS[family(name)][layers]


@pytest.mark.parametrize(("name", "layers", "cfg", "batch"), list(_everywhere()))
def test_equals_three_separate_forwards(name, layers, cfg, batch):
    pipe, named = _of(name, layers)

    def run():
        return latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=cfg))

    stock = run()
    truth = slow(pipe, name, named, call_kwargs(name, pipe, batch=batch, cfg=cfg))
    assert relative(truth, stock) > 1e-3, "PAG makes no difference here"
    with pag_fast.patched(pipe, named, pag_scale=3.0):
        patched = run()
        assert not pipe._pag_fast.fallbacks
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
        # a denoiser keeps the same from call to call, whichever pipeline it is in
        if _is_first(name) and layers == "middle":
            assert torch.equal(run(), patched), "a second call gives another picture"
    assert relative(patched, truth) < 1e-5
    if _is_first(name) and layers == "middle":
        assert torch.equal(run(), stock), "unpatching changed the picture"


@pytest.mark.parametrize("name", [SD, "StableDiffusionControlNetPipeline", FLUX, SD3])
def test_the_default_layers_and_a_scale_for_each_call(name):
    pipe = built_host(name)
    layers = [r"\.0\."] if name in (FLUX, SD3) else None  # 3 blocks have no thirteenth

    def run(**extra):
        return latents(pipe, {**call_kwargs(name, pipe), **extra})

    stock = run()
    with pag_fast.patched(pipe, layers):
        assert pipe.pag_scale == 3.0 and pipe.do_perturbed_attention_guidance
        default, three, one = run(), run(pag_scale=3.0), run(pag_scale=1.0)
        assert torch.equal(run(pag_scale=0.0), stock)
        assert pipe.pag_scale == 3.0, "a call's scale is for that call"
    assert torch.equal(default, three)
    assert relative(one, three) > 1e-4
    with pag_fast.patched(pipe, layers, pag_scale=1.0):
        assert torch.equal(run(), one)


@pytest.mark.parametrize("name", [SD, "StableDiffusionImg2ImgPipeline", FLUX, WAN, LUMINA])
def test_adaptive_scale(name):
    """Diffusers' formula of the scheduler's timesteps, whatever the model is told of them."""
    pipe = built_host(name)
    layers = HOSTS[name].layers["middle"]
    extra = {"strength": 0.5} if "Img2Img" in name else {}

    def kwargs():
        return call_kwargs(name, pipe, steps=4, **extra)

    latents(pipe, kwargs())
    steps = [float(t) for t in pipe.scheduler.timesteps][-2 if extra else 0 :]
    truth = slow(pipe, name, layers, kwargs(), lambda i: max(0.0, 3.0 - 0.01 * (1000 - steps[i])))
    with pag_fast.patched(pipe, layers, pag_adaptive_scale=0.01):
        patched = latents(pipe, kwargs())
        dropped = pipe._pag_fast.steps["perturbed branch dropped"]
    assert dropped == sum(3.0 - 0.01 * (1000 - t) <= 0 for t in steps) > 0
    assert relative(patched, truth) < 1e-5


def test_the_two_denoisers_of_wan():
    """High noise goes through one model, low noise through the other: both get PAG."""
    pipe = build(WAN)
    second = build(WAN, num_layers=4).transformer
    torch.manual_seed(1)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.9)
    layers = HOSTS[WAN].layers["middle"]
    truth = None
    kwargs = functools.partial(call_kwargs, WAN, pipe, steps=4, guidance_scale_2=3.0)
    first_only = latents(pipe, kwargs())
    calls = []
    handle = second.register_forward_hook(observing(lambda *_: calls.append(1)))
    with pag_fast.patched(pipe, layers):
        truth = latents(pipe, kwargs())
        assert pipe._pag_fast.steps["shared"] == 4
    handle.remove()
    assert 0 < len(calls) < 8
    assert relative(truth, first_only) > 1e-3
    # the scale of the second model divides its difference: cond' = cond + (s/g₂)·(cond − perturbed)
    with pag_fast.patched(pipe, layers):
        pipe._pag_fast.host = dataclasses.replace(pipe._pag_fast.host, scale=lambda *_: None)
        assert relative(latents(pipe, kwargs()), truth) < 1e-5


@pytest.mark.parametrize("name", [SD, FLUX, LUMINA])
def test_a_callback_that_changes_the_prompt(name):
    """Copies of the prompt that were made for the perturbed rows follow it."""
    pipe, layers = built_host(name), HOSTS[name].layers["middle"]

    def callback(pipe, step, timestep, tensors):
        tensors["prompt_embeds"] = tensors["prompt_embeds"].roll(1, -1)
        return tensors

    def kwargs():
        inputs = ["latents", "prompt_embeds"]
        return call_kwargs(
            name,
            pipe,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=inputs,
        )

    truth = slow(pipe, name, layers, kwargs())
    with pag_fast.patched(pipe, layers):
        assert relative(latents(pipe, kwargs()), truth) < 1e-5
        unchanged = latents(pipe, call_kwargs(name, pipe))
    assert relative(unchanged, truth) > 1e-4


@pytest.mark.parametrize("name", [SD, "StableDiffusionControlNetPipeline", FLUX, WAN, LUMINA])
def test_nothing_is_left_behind(name, snapshot):
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe))
    before = snapshot(pipe)  # some pipelines' first call leaves a registry of diffusers' behind
    pag_fast.patch(pipe, HOSTS[name].layers["middle"])
    patched = latents(pipe, call_kwargs(name, pipe))
    model = denoiser_of(pipe)
    attention = next(iter(resolve(model, HOSTS[name].layers["middle"]).values()))
    for where in (attention, model):
        between = snapshot(pipe)
        handle = where.register_forward_hook(observing(lambda *_: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            latents(pipe, call_kwargs(name, pipe))
        handle.remove()
        assert snapshot(pipe) == between
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), patched)
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


_COMPILED = (
    *(SD, SD3, FLUX, WAN),
    *("QwenImagePipeline", "LTXPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline"),
    # whose layers' own processors go on running
    *("Flux2Pipeline", "ChromaPipeline", "ZImagePipeline"),
)


@pytest.mark.parametrize("name", [name for name in _COMPILED if name in HOSTS])
def test_compiled_without_recompiling(name):
    """A graph for the rows that hold cond and, where uncond has a pass of its own, one for that."""
    torch._dynamo.reset()
    pipe, layers = least(name)
    eager = slow(pipe, name, layers, call_kwargs(name, pipe))
    config = CompileConfig(backend="eager")
    before = counters["stats"]["unique_graphs"]
    with pag_fast.patched(pipe, layers, compile=config):
        assert relative(latents(pipe, call_kwargs(name, pipe)), eager) < 1e-5
        made = counters["stats"]["unique_graphs"] - before
        for scale in (1.0, 2.0):
            latents(pipe, call_kwargs(name, pipe, steps=3, pag_scale=scale))
        assert counters["stats"]["unique_graphs"] - before == made
    assert made == (2 if HOSTS[name].apart else 1)
    torch._dynamo.reset()


def test_what_depends_on_the_prompt_runs_once_for_each_pass():
    pipe, calls = build(FLUX), []
    pipe.transformer.context_embedder.register_forward_hook(observing(lambda *_: calls.append(1)))
    weight = pipe.transformer.context_embedder.weight
    counted = []
    with pag_fast.patched(pipe, HOSTS[FLUX].layers["middle"]), _Products(weight, counted):
        latents(pipe, call_kwargs(FLUX, pipe, steps=4))
    # three steps compute one of the two kept modules again, in turn, in the first of their passes
    assert len(calls) == 8 and len(counted) == 2 + 1


@row_wise
class _Products(TorchFunctionMode):
    """Counts the products with one weight."""

    def __init__(self, weight, counted):
        super().__init__()
        self.weight, self.counted = weight, counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[1] is self.weight:
            self.counted.append(1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [SD, SD3])
def test_a_window_compiles_no_third_graph(name):
    """The step without a perturbed branch is compiled in the first, whatever its loop's strides."""
    torch._dynamo.reset()
    pipe, layers = least(name)
    regional = CompileConfig(backend="eager", regional=True)
    options = {"schedule": pag_fast.Schedule(stop=2), "compile": regional}
    graphs = []

    def callback(pipe, step, timestep, tensors):
        graphs.append(counters["stats"]["unique_graphs"])
        return {}

    with pag_fast.patched(pipe, layers, **options):
        latents(pipe, call_kwargs(name, pipe, steps=4, callback_on_step_end=callback))
        assert pipe._pag_fast.steps == {"shared": 2, "perturbed branch dropped": 2}
    assert len(set(graphs)) == 1
    torch._dynamo.reset()
