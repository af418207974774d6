"""Projections that diffusers has fused: perturbed layers run the layers that these were made of."""

from __future__ import annotations

import pytest
import torch
from built_hosts import denoiser_of, slow
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve

NAMES = ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline", "StableDiffusion3Pipeline"]


def _fused(name):
    pipe = build(name)
    denoiser_of(pipe).fuse_qkv_projections()
    return pipe, HOSTS[name].layers["middle"]


def _perturbed(pipe, layers):
    return next(iter(resolve(denoiser_of(pipe), layers).values()))


def _lora(pipe, layers):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["to_v"], init_lora_weights="gaussian")
    denoiser_of(pipe).add_adapter(config)
    for name, p in denoiser_of(pipe).named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)


def _written(pipe, layers):
    with torch.no_grad():
        _perturbed(pipe, layers).to_qkv.weight.mul_(1.5)


def _moved(pipe, layers):
    with torch.no_grad():
        _perturbed(pipe, layers).to_k.weight.mul_(1.5)


@pytest.mark.parametrize("name", NAMES)
def test_equals_slow_pag(name):
    pipe, layers = _fused(name)
    truth = slow(pipe, name, layers, call_kwargs(name, pipe))
    pag_fast.patch(pipe, layers)
    assert relative(latents(pipe, call_kwargs(name, pipe)), truth) < 1e-5


@pytest.mark.parametrize("change", [_lora, _written, _moved])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_others_since_are_refused(name, change):
    """What such a model computes is neither what its layers say nor what was fused."""
    pipe, layers = _fused(name)
    pag_fast.patch(pipe, layers)
    before = latents(pipe, call_kwargs(name, pipe))
    change(pipe, layers)
    with pytest.raises(ValueError, match=r"runs projections that were fused .* fuse again"):
        latents(pipe, call_kwargs(name, pipe))
    # what unfused layers compute is no question
    if hasattr(denoiser_of(pipe), "unfuse_qkv_projections"):
        pag_fast.unpatch(pipe)
        denoiser_of(pipe).unfuse_qkv_projections()
        truth = slow(pipe, name, layers, call_kwargs(name, pipe))
        pag_fast.patch(pipe, layers)
        assert relative(latents(pipe, call_kwargs(name, pipe)), truth) < 1e-5
        assert (relative(truth, before) > 1e-4) == (change is not _written)


def test_an_adapter_in_front_of_fusing_counts_as_the_model_has_it():
    """Fused while it is merged, or while it is off."""
    name = "FluxPipeline"
    pipe, layers = build(name), HOSTS[name].layers["middle"]
    _lora(pipe, layers)
    model = denoiser_of(pipe)
    model.disable_adapters()
    model.fuse_qkv_projections()
    truth = slow(pipe, name, layers, call_kwargs(name, pipe))
    pag_fast.patch(pipe, layers)
    assert relative(latents(pipe, call_kwargs(name, pipe)), truth) < 1e-5
    model.enable_adapters()
    with pytest.raises(ValueError, match="were fused"):
        latents(pipe, call_kwargs(name, pipe))
