"""What users put into a model with PAG: LoRA, image prompts, other linears and processors, …"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from numerics import observing, relative
from parity import assert_parity
from random_adapters import FAMILIES, UNETS, add_lora, denoiser_of, with_ip_adapter
from shallow import LAYERS, build, family
from tiny import PIPELINES, SIZE, call_kwargs, latents

import pag_fast


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name, cfg):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    plain = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    add_lora(denoiser_of(pipe))
    stock = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(stock, plain) > 1e-3
    assert_parity(pipe, name, cfg=cfg)


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
    add_lora(pipe.unet)
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
    assert_parity(pipe, name)
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
    for name_, module in list(denoiser_of(pipe).named_modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear and "attn" in name_ and "pool" not in name_:
                setattr(module, child, QuantizedLinear(linear))
    assert assert_parity(pipe, name) == {"shared": 4}


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", UNETS)
def test_ip_adapter(name, cfg, batch):
    pipe = build(name, pag_applied_layers=LAYERS[family(name)]["middle"])
    plain = latents(pipe, call_kwargs(name, pipe, cfg=cfg, batch=batch))
    with_ip_adapter(pipe)

    def embeds():
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(2 if cfg else 1, 1, 6, generator=generator)]

    kwargs = {"cfg": cfg, "batch": batch}
    stock = latents(pipe, call_kwargs(name, pipe, ip_adapter_image_embeds=embeds(), **kwargs))
    assert relative(stock, plain) > 1e-3
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, ip_adapter_image_embeds=embeds(), **kwargs))
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
        with_ip_adapter(pipe)  # builds processors without arguments: must not meet ours
    assert relative(patched, stock) < 1e-5


def test_an_image_prompt_is_projected_once_per_call():
    """Keys, values and the projection of an IP-Adapter's picture do not depend on the step."""
    name, calls = "StableDiffusionPAGPipeline", []
    pipe = with_ip_adapter(build(name))
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
    pipe = with_ip_adapter(build(name))
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
    model, seen = denoiser_of(pipe), []

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
