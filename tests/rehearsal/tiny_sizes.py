"""Sizes of a rehearsal: every case of the GPU benchmarks, in a model that a CPU runs at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

_UNET = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "layers_per_block": 1}
_XL = {
    "block_out_channels": (32, 32, 32),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 1),
    "cross_attention_dim": 32,
    "layers_per_block": 1,
}
_DIT = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
# configuration and perturbed layers, by the beginning of the case's name
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "SDXL": (_XL, ("mid",)),
    "SD 1.5": (_UNET, ("mid",)),
    "SD3": (
        {**_DIT, "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        ("blocks.1",),
    ),
    "PixArt": ({**_DIT, "cross_attention_dim": 32, "caption_channels": 32}, ("blocks.1",)),
    "Sana": (
        {
            **_DIT,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
        },
        ("transformer_blocks.1",),
    ),
    "HunyuanDiT": (
        {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 32,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
        },
        ("blocks.1",),
    ),
    "AnimateDiff": (_UNET, ("mid_block.*attn1",)),
}


def cases(module: Any) -> None:
    """For ``benchmarks.cases``."""
    module.GPU[:] = [_tiny(case) for case in module.GPU]
    small = {"tokens": 24, "heads": 2, "head_dim": 16}
    module.LAYERS[:] = [
        replace(layer, **small, context=5 if layer.context else 0) for layer in module.LAYERS
    ]
    module.LATENTS[:] = [2, 4, 8, 8]
    module.EMOJI_CALL["num_inference_steps"] = 2
    module.SDXL_CALL["num_inference_steps"] = 2
    del module.EMOJI_JOBS[1:]
    module.SDXL_VAE |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


def _tiny(case: Any) -> Any:
    config, layers = next(found for key, found in CONFIGS.items() if case.name.startswith(key))
    # a middle of one token would have nothing to perturb
    latent = 8 if case.name.startswith(("SDXL", "AnimateDiff")) else 16
    return replace(case, config=config, layers=layers, latent=latent, steps=2, rounds=2, frames=2)


def tiles(module: Any) -> None:
    """For ``benchmarks.tiles``."""
    module.MODELS[:] = [("tiny joint", 24, 2, 16, 7), ("tiny", 24, 2, 16, 0)]
    del module.MIXES[2:]
    module.SAMPLES = 2
    module.CANDIDATES[:] = [module.Config(16, 16, 4, 1), module.Config(32, 16, 4, 1)]
    del module.DTYPES[1:]


def queued(module: Any) -> None:
    """For ``benchmarks.queued``."""
    module.CACHE = 1024
    module.LONGEST = 4e-4  # the interpreter takes longer than any sleep
