"""``Flux2Transformer2DModel``: FLUX.2 and FLUX.2 Klein."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors.stock import PerturbedStockAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, TEXT, TEXT_THEN_IMAGE, Layout, Stream
from ..sharing.tokens import Run
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors, packed, text_in_front

_LAYOUT = Layout(("transformer_blocks", "single_transformer_blocks"), ("attn",))
_TEXT_TOKENS = 512  # as long as the pipeline pads prompts
_KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, tokens = model.config, packed(latent)
    return {
        "hidden_states": new(rows, tokens, config.in_channels),
        "timestep": new(rows),
        "guidance": new(rows, dtype=torch.float32) if config.guidance_embeds else None,
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.joint_attention_dim),
        "txt_ids": new(rows, _TEXT_TOKENS, 4),
        "img_ids": new(rows, tokens, 4),
    }


def _tokens(model: Any, call: dict[str, Any]) -> tuple[Run, ...]:
    if call.get("kv_cache_mode") is not None:
        raise ValueError(
            "FLUX.2 Klein keeps keys and values of its reference pictures from step to step, which "
            "no perturbed branch can share: call the pipeline without pictures, or use "
            "Flux2KleinPipeline, which attends to them anew in every step."
        )
    # pictures that are edited are behind those that are denoised, and perturbed as they are
    return text_in_front(model, call)


DESCRIPTION = ModelDescription(
    "Flux2Transformer2DModel",
    PerturbedStockAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={
        "Flux2TransformerBlock": TEXT_THEN_IMAGE,
        "Flux2SingleTransformerBlock": (Stream("hidden_states", (TEXT, IMAGE)),),
    },
    layout=_LAYOUT,
    replaces=frozenset(
        {
            "Flux2AttnProcessor",
            "Flux2ParallelSelfAttnProcessor",
            "Flux2KVAttnProcessor",
            "Flux2KVParallelSelfAttnProcessor",
        }
    ),
    fusable_processors=frozenset({"Flux2AttnProcessor"}),
    tokens=_tokens,
    checkpoints=(
        Checkpoint("Flux2Pipeline", "FLUX.2-dev"),
        Checkpoint(
            "Flux2KleinPipeline",
            "FLUX.2-klein-4B",
            {**_KLEIN, "joint_attention_dim": 7680, "guidance_embeds": False},
        ),
        Checkpoint(
            "Flux2KleinPipeline",
            "FLUX.2-klein-9B",
            {**_KLEIN_9B, "joint_attention_dim": 12288, "guidance_embeds": False},
            variant="9B",
        ),
    ),
)
