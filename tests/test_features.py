"""What users combine PAG with: adapters, offloading, fused projections, several ControlNets, …"""

from __future__ import annotations

import re

import diffusers
import pytest
import tiny
import torch
from numerics import observing, relative
from shallow import LAYERS, build, family
from tiny import PIPELINES, SIZE, call_kwargs, latents

import pag_fast

UNETS = ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline", "AnimateDiffPAGPipeline"]
FAMILIES = [
    *UNETS,
    "StableDiffusion3PAGPipeline",
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
]


def _assert_parity(pipe, name, tolerance=1e-5, **kwargs):
    stock = latents(pipe, call_kwargs(name, pipe, **kwargs))
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, **kwargs))
        again = latents(pipe, call_kwargs(name, pipe, **kwargs))
        steps = dict(pipe._pag_fast.steps)
    assert relative(patched, stock) < tolerance
    assert torch.equal(patched, again)
    return steps


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _lora_layers(model):
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    return [n for n in ("to_q", "to_k", "to_v", "add_k_proj") if n in names]


def _add_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=_lora_layers(model), init_lora_weights=False)
    inject_adapter_in_model(config, model)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name, cfg):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    plain = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    _add_lora(_model(pipe))
    stock = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(stock, plain) > 1e-3
    _assert_parity(pipe, name, cfg=cfg)


def test_lora_scale_and_loading_between_calls():
    """An adapter that is added while the pipeline is patched takes part from then on."""
    from transformers import CLIPTextConfig, CLIPTextModel

    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))
    # the pipeline scales the adapters of its text encoder too, so it has to have one
    pipe.text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    )
    latents(pipe, call_kwargs(name, pipe))
    _add_lora(pipe.unet)
    pictures = []
    for scale in (1.0, 0.3):
        kwargs = {"cross_attention_kwargs": {"scale": scale}}
        pictures.append(latents(pipe, call_kwargs(name, pipe, **kwargs)))
        pag_fast.unpatch(pipe)
        assert relative(pictures[-1], latents(pipe, call_kwargs(name, pipe, **kwargs))) < 1e-5
        pag_fast.patch(pipe)
    assert relative(*pictures) > 1e-3


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"])
def test_fused_projections(name):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    before = latents(pipe, call_kwargs(name, pipe))
    pipe.unet.fuse_qkv_projections()
    _assert_parity(pipe, name)
    pipe.unet.unfuse_qkv_projections()
    assert relative(latents(pipe, call_kwargs(name, pipe)), before) < 1e-5


def test_fusing_while_patched():
    name = "StableDiffusionPAGPipeline"
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    pipe.unet.fuse_qkv_projections()
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5


@observing  # each row by itself
@observing  # as the libraries that pag_fast knows: each row by itself
class QuantizedLinear(torch.nn.Module):
    """A linear layer as quantization libraries make them: not ``nn.Linear``, int8 weights."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed * self.scale, self.bias)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_linears(name):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    for name_, module in list(_model(pipe).named_modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear and "attn" in name_ and "pool" not in name_:
                setattr(module, child, QuantizedLinear(linear))
    assert _assert_parity(pipe, name) == {"shared": 4}


def _with_ip_adapter(pipe, dim=12, tokens=4):
    """Load an IP-Adapter of random weights, made for the pipeline's UNet."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    unet, state, index = pipe.unet, {}, 1
    for name in unet.attn_processors:
        cross = None if name.endswith("attn1.processor") or "motion_module" in name else dim
        if cross is None:
            index += 0
            continue
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        weights = IPAdapterAttnProcessor2_0(hidden, cross, num_tokens=(tokens,)).state_dict()
        state[f"{index}.to_k_ip.weight"] = weights["to_k_ip.0.weight"]
        state[f"{index}.to_v_ip.weight"] = weights["to_v_ip.0.weight"]
        index += 2
    projection = {
        "proj.weight": torch.randn(tokens * dim, 6),
        "proj.bias": torch.randn(tokens * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])
    return pipe


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", UNETS)
def test_ip_adapter(name, cfg, batch):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    plain = latents(pipe, call_kwargs(name, pipe, cfg=cfg, batch=batch))
    _with_ip_adapter(pipe)

    def embeds():
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(2 if cfg else 1, 1, 6, generator=generator)]

    kwargs = {"cfg": cfg, "batch": batch}
    stock = latents(pipe, call_kwargs(name, pipe, ip_adapter_image_embeds=embeds(), **kwargs))
    assert relative(stock, plain) > 1e-3
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, ip_adapter_image_embeds=embeds(), **kwargs))
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
        _with_ip_adapter(pipe)  # builds processors without arguments: must not meet ours
    assert relative(patched, stock) < 1e-5


def test_an_image_prompt_is_projected_once_per_call():
    """Keys, values and the projection of an IP-Adapter's picture do not depend on the step."""
    name, calls = "StableDiffusionPAGPipeline", []
    pipe = _with_ip_adapter(build(name))
    watched = [m for n, m in pipe.unet.named_modules() if re.search(r"to_[kv]_ip\.0$", n)]
    for module in [*watched, pipe.unet.encoder_hid_proj.image_projection_layers[0]]:
        forward = module.forward
        module.forward = observing(lambda x, f=forward: calls.append(1) or f(x))
    image = [torch.randn(2, 1, 6)]

    def run(**options):
        calls.clear()
        kwargs = call_kwargs(name, pipe, steps=4, ip_adapter_image_embeds=image, **options)
        return latents(pipe, kwargs), len(calls)

    stock, every_step = run()
    assert every_step == 4 * (len(watched) + 1)
    pag_fast.patch(pipe)
    patched, once = run()
    # and one of all kept modules a step is computed again, in turn
    assert len(watched) + 1 <= once <= len(watched) + 1 + 3
    assert relative(patched, stock) < 1e-5

    def louder(pipe, step, timestep, tensors):
        if step == 1:
            pipe.set_ip_adapter_scale(0.1)
        return tensors

    pipe.set_ip_adapter_scale(1.0)
    patched, _ = run(callback_on_step_end=louder)
    pag_fast.unpatch(pipe).set_ip_adapter_scale(1.0)
    changed, _ = run(callback_on_step_end=louder)
    assert relative(changed, stock) > 1e-5
    assert relative(patched, changed) < 1e-5


def test_ip_adapter_masks():
    from diffusers.image_processor import IPAdapterMaskProcessor

    name = "StableDiffusionPAGPipeline"
    pipe = _with_ip_adapter(build(name))
    mask = IPAdapterMaskProcessor().preprocess(torch.rand(1, 1, SIZE, SIZE), SIZE, SIZE)

    def run():
        torch.manual_seed(3)
        return latents(
            pipe,
            call_kwargs(
                name,
                pipe,
                ip_adapter_image_embeds=[torch.randn(2, 1, 6)],
                cross_attention_kwargs={"ip_adapter_masks": [mask]},
            ),
        )

    stock = run()
    with pag_fast.patched(pipe):
        assert relative(run(), stock) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_processors_of_other_layers_are_kept(name):
    """Only perturbed layers change hands, and only while a call runs."""
    pipe = pag_fast.patch(build(name), LAYERS[family(name)]["last"])
    model, seen = _model(pipe), []

    @observing
    def look(*_):
        seen.append(dict(model.attn_processors))

    handle = model.register_forward_hook(look)
    before = dict(model.attn_processors)
    latents(pipe, call_kwargs(name, pipe))
    handle.remove()
    changed = [key for key in before if seen[0][key] is not before[key]]
    layers = pag_fast.explain(pipe, flops=False).layers
    assert sorted(changed) == sorted(f"{layer}.processor" for layer in layers)
    assert model.attn_processors == before
    assert pipe.pag_attn_processors == {}


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
    _assert_parity(pipe, name)


def test_free_u():
    name = "StableDiffusionPAGPipeline"
    for layers in PIPELINES[name].layers.values():
        pipe = tiny.build(name, pag_applied_layers=layers)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        _assert_parity(pipe, name)


@pytest.mark.parametrize("name", [n for n in PIPELINES if PIPELINES[n].controlnet])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_several_controlnets(name, cfg):
    pipe = build(name, controlnets=2, pag_applied_layers=LAYERS[family(name)]["middle"])
    assert _assert_parity(pipe, name, cfg=cfg, batch=2) == {"shared": 4}


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
    _assert_parity(pipe, name, batch=2)


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
    model, rows = _model(pipe), []

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
    _assert_parity(pipe, name, steps=3, pag_adaptive_scale=0.003)


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


def test_t2i_adapter_residuals():
    """No PAG pipeline passes them, but a UNet call may: they get the rows of what they go to."""
    name = "StableDiffusionPAGPipeline"
    for layers in PIPELINES[name].layers.values():
        pipe = tiny.build(name, pag_applied_layers=layers)
        torch.manual_seed(1)
        residuals = [torch.randn(1, c, s, s) for c, s in ((8, 8), (16, 4), (16, 2))]
        forward = pipe.unet.forward

        def add(*args, forward=forward, residuals=residuals, **kwargs):
            rows = kwargs["sample"].shape[0] if "sample" in kwargs else args[0].shape[0]
            kwargs.setdefault(
                "down_intrablock_additional_residuals",
                [torch.cat([r] * rows) for r in residuals],
            )
            return forward(*args, **kwargs)

        pipe.unet.forward = add
        stock = latents(pipe, call_kwargs(name, pipe))
        del pipe.unet.forward
        pag_fast.patch(pipe)
        enter = pag_fast.runtime.session.Session.enter_denoiser

        def with_residuals(self, forward, found, enter=enter, residuals=residuals):
            extra = [torch.cat([r] * forward.call["sample"].shape[0]) for r in residuals]
            forward.call["down_intrablock_additional_residuals"] = extra
            return enter(self, forward, found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pag_fast.runtime.session.Session, "enter_denoiser", with_residuals)
            patched = latents(pipe, call_kwargs(name, pipe))
        assert pipe._pag_fast.steps["shared"] and not pipe._pag_fast.fallbacks
        assert relative(patched, stock) < 1e-5
        pag_fast.unpatch(pipe)
        assert relative(patched, latents(pipe, call_kwargs(name, pipe))) > 1e-3
