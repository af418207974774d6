"""What users combine PAG with: offloading, layouts, ControlNets, scales, other pipelines, …"""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from numerics import observing, relative
from parity import assert_parity
from random_adapters import FAMILIES, denoiser_of
from shallow import LAYERS, build, family
from tiny import PIPELINES, call_kwargs, latents

import pag_fast


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in FAMILIES
        for kind in ("model", "sequential")
        # stock cannot: its nn.MultiheadAttention reads weights that are not there
        if (name, kind) != ("HunyuanDiTPAGPipeline", "sequential")
    ],
)
def test_cpu_offload_hooks(name, kind):
    """What ``enable_model_cpu_offload`` and ``enable_sequential_cpu_offload`` install.

    They ask for an accelerator, so accelerate is called as they call it: hooks on whole models, or
    on every leaf, whose weights are on the meta device between forwards.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook

    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    stock = latents(pipe, call_kwargs(name, pipe))
    cpu, hook = torch.device("cpu"), None
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            if kind == "sequential":
                cpu_offload(component, cpu, offload_buffers=len(component._parameters) > 0)
            else:
                _, hook = cpu_offload_with_hook(component, cpu, prev_module_hook=hook)
    offloaded = latents(pipe, call_kwargs(name, pipe))
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe))
        assert pipe._pag_fast.steps["shared"] == 2
    assert torch.equal(offloaded, stock)
    assert relative(patched, stock) < 1e-5


def test_group_offload():
    name = "StableDiffusionXLPAGPipeline"
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    stock = latents(pipe, call_kwargs(name, pipe))
    cpu = torch.device("cpu")
    try:
        pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    except AttributeError:
        if torch.accelerator.is_available():
            raise
        pytest.skip("this diffusers asks for the type of an accelerator that is not there")
    with pag_fast.patched(pipe):
        assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5


@pytest.mark.parametrize("name", [n for n in PIPELINES if PIPELINES[n].denoiser == "unet"])
def test_channels_last(name):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    if name != "AnimateDiffPAGPipeline":
        pipe.unet.to(memory_format=torch.channels_last)
        if PIPELINES[name].controlnet:
            pipe.controlnet.to(memory_format=torch.channels_last)
    assert_parity(pipe, name)


def test_free_u():
    name = "StableDiffusionPAGPipeline"
    for layers in PIPELINES[name].layers.values():
        pipe = tiny.build(name, pag_applied_layers=layers)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert_parity(pipe, name)


@pytest.mark.parametrize("name", [n for n in PIPELINES if PIPELINES[n].controlnet])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_several_controlnets(name, cfg):
    pipe = build(name, controlnets=2, pag_applied_layers=LAYERS[family(name)]["middle"])
    assert assert_parity(pipe, name, cfg=cfg, batch=2) == {"shared": 4}


@pytest.mark.parametrize("layers", ["default", "middle", "last", "all"])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_controlnet_runs_without_the_perturbed_rows(cfg, layers):
    name = "StableDiffusionControlNetPAGPipeline"
    sets = {**PIPELINES[name].layers, **LAYERS[name]}
    pipe = build(name, pag_applied_layers=sets[layers])
    rows = []
    handle = pipe.controlnet.mid_block.register_forward_pre_hook(
        observing(lambda _, args: rows.append(args[0].shape[0]))
    )
    pag_fast.patch(pipe)
    latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    handle.remove()
    assert rows == [2 if cfg else 1] * 2


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("name", [n for n in PIPELINES if PIPELINES[n].mask])
def test_inpainting_unets(name, in_channels):
    pipe = build(name, in_channels=in_channels)
    assert_parity(pipe, name, batch=2)


# the loops differ by pipeline, the formula and the rows do not: one of each kind has every scale
_ADAPTIVE = [n for n in PIPELINES if n != "PixArtSigmaPAGPipeline"]
_EVERY_SCALE = ["StableDiffusionPAGPipeline", "AnimateDiffPAGPipeline", "SanaPAGPipeline"]


@pytest.mark.parametrize(
    ("name", "adaptive", "cfg"),
    [
        *((name, 0.5, True) for name in _ADAPTIVE),
        *((name, 0.5, False) for name in _EVERY_SCALE),
        *(
            (name, adaptive, cfg)
            for name in _EVERY_SCALE
            for adaptive in (0.002, 0.01)
            for cfg in (True, False)
        ),
    ],
)
def test_adaptive_scale_drops_the_branch_at_zero(name, adaptive, cfg):
    pipe = build(name)
    kwargs = {"pag_adaptive_scale": adaptive, "cfg": cfg, "steps": 4}
    stock = latents(pipe, call_kwargs(name, pipe, **kwargs))
    model, rows = denoiser_of(pipe), []

    @observing
    def look(module, args, kwargs, out):
        rows.append((out[0] if isinstance(out, tuple) else out.sample).shape[0])

    handle = model.register_forward_hook(look, with_kwargs=True)
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, **kwargs))
        dropped = pipe._pag_fast.steps["perturbed branch dropped"]
    handle.remove()
    assert relative(patched, stock) < 1e-5
    full = 3 if cfg else 2
    assert rows.count(full - 1) == dropped
    assert rows.count(full) == 4 - dropped
    if adaptive == 0.5:
        assert dropped >= 2


@pytest.mark.parametrize("name", PIPELINES)
def test_pag_scale_zero_is_plain_diffusers(name):
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe, pag_scale=0.0))
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, pag_scale=0.0))
        assert not pipe._pag_fast.steps
    assert torch.equal(patched, stock)


def test_scale_set_to_zero_by_a_callback():
    """The pipeline then takes its CFG-only path, which needs two branches: stock gives three."""
    name = "StableDiffusionPAGPipeline"
    pipe = build(name)

    def callback(pipe, i, t, tensors):
        pipe._pag_scale = 0.0
        return tensors

    kwargs = {"steps": 3, "callback_on_step_end": callback}
    with pytest.raises((ValueError, RuntimeError)):
        latents(pipe, call_kwargs(name, pipe, **kwargs))
    with pag_fast.patched(pipe):
        latents(pipe, call_kwargs(name, pipe, **kwargs))
        assert dict(pipe._pag_fast.steps) == {"shared": 1, "perturbed branch dropped": 2}


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_other_schedulers(kind):
    name = "StableDiffusionXLPAGPipeline"
    pipe = build(name)
    pipe.scheduler = getattr(diffusers, kind)()
    assert_parity(pipe, name, steps=3, pag_adaptive_scale=0.003)


def test_siblings_from_pipe_share_modules_and_stay_stock():
    name = "StableDiffusionXLPAGPipeline"
    pipe = build(name)
    sibling = diffusers.StableDiffusionXLPAGPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    sibling.set_progress_bar_config(disable=True)
    stock = latents(sibling, call_kwargs(name, sibling))
    pag_fast.patch(pipe)
    patched = latents(pipe, call_kwargs(name, pipe))
    assert not isinstance(sibling, type(pipe))
    assert torch.equal(latents(sibling, call_kwargs(name, sibling)), stock)
    # both patched, each with its own layers
    pag_fast.patch(sibling, ["down_blocks"])
    assert relative(latents(pipe, call_kwargs(name, pipe)), patched) == 0.0
    assert relative(latents(sibling, call_kwargs(name, sibling)), stock) > 1e-3


def test_saving_and_auto_pipelines(tmp_path):
    name = "StableDiffusionXLPAGPipeline"
    pipe = pag_fast.patch(build(name))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded).__name__ == name
    assert not hasattr(loaded, "_pag_fast")
    plain = diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=False)
    assert type(plain) is diffusers.StableDiffusionXLPipeline


def test_a_replaced_denoiser_is_used():
    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))
    latents(pipe, call_kwargs(name, pipe))
    other = build(name, seed=7)
    stock = latents(other, call_kwargs(name, other))
    pipe.unet = other.unet
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
