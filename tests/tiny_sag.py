"""``StableDiffusionSAGPipeline`` in miniature: its calls, and what a patch could leave on it."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from copies import made_once
from shallow import TWO_BLOCKS

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
DDIM = diffusers.DDIMScheduler


class Injected(Exception):
    pass


@made_once
def build_sag(scheduler=None, *, whole=False, **overrides):
    """With two blocks, or all three of ``tiny.py``."""
    torch.manual_seed(0)
    overrides = overrides if whole else {**TWO_BLOCKS, **overrides}
    parts = {"vae": tiny.vae(), "unet": tiny.unet(**overrides)}
    for module in parts.values():
        tiny.randomise(module)
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = diffusers.StableDiffusionSAGPipeline(
        **parts,
        **dict.fromkeys(names),
        scheduler=scheduler or DDIM(clip_sample=False),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sag_kwargs(batch=1, cfg=True, **extra):
    source = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, batch, 5, 12, generator=source)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "guidance_scale": 5.0 if cfg else 1.0,
        "sag_scale": 0.75,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
        **extra,
    }


def sag_latents(pipe, *args, **kwargs):
    return pipe(**sag_kwargs(*args, **kwargs)).images


def sag_snapshot(pipe):
    """Everything about a pipeline that a patch could leave behind."""
    seen = {"class": type(pipe), "attributes": {k for k in vars(pipe) if "pag_fast" in k}}
    for name, module in pipe.unet.named_modules():
        seen[name] = (
            set(vars(module)),
            vars(module).get("forward"),
            getattr(module, "processor", None),
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks.values()),
        )
    return seen


def add_lora(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config)
