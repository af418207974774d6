"""Adapters of random weights, LoRA and image prompts, and the pipelines that get them."""

from __future__ import annotations

import torch

UNETS = ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline", "AnimateDiffPAGPipeline"]
FAMILIES = [
    *UNETS,
    "StableDiffusion3PAGPipeline",
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
]


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _lora_layers(model):
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    return [n for n in ("to_q", "to_k", "to_v", "add_k_proj") if n in names]


def add_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=_lora_layers(model), init_lora_weights=False)
    inject_adapter_in_model(config, model)


def with_ip_adapter(pipe, dim=12, tokens=4):
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
