"""``Lumina2Transformer2DModel``: Lumina-Image 2.0."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors import PerturbedLuminaAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, PADDING, TEXT, Layout, Stream
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(("layers",), ("attn",), before=("context_refiner", "noise_refiner"))
_TEXT_TOKENS = 256  # as long as the pipeline pads prompts


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.cap_feat_dim),
        "encoder_attention_mask": new.mask(rows, _TEXT_TOKENS),
    }


def _sequence(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    patch = model.config.patch_size
    height, width = call["hidden_states"].shape[-2:]
    # the model reads these lengths from the device in every forward, too
    text = call["encoder_attention_mask"].sum(dim=1).tolist()
    return tuple(map(int, text)), (height // patch) * (width // patch)


DESCRIPTION = ModelDescription(
    "Lumina2Transformer2DModel",
    PerturbedLuminaAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    # what a shorter prompt leaves free is behind the image
    blocks={"Lumina2TransformerBlock": (Stream("hidden_states", (TEXT, IMAGE, PADDING)),)},
    layout=_LAYOUT,
    replaces=frozenset({"Lumina2AttnProcessor2_0"}),
    fusable_processors=frozenset({"Lumina2AttnProcessor2_0"}),
    sequence=_sequence,
    checkpoints=(Checkpoint("Lumina2Pipeline", "Lumina-Image 2.0", {"cap_feat_dim": 2304}),),
)
