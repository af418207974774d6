"""``ZImageTransformer2DModel``: Z-Image."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors.stock import PerturbedStockAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, PADDING, TEXT, Layout, Stream
from ..sharing.tokens import Run
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(("layers",), ("attention",), before=("noise_refiner", "context_refiner"))
_TEXT_TOKENS = 128  # prompts are as long as they are
_MULTIPLE = 32  # to which the model pads the tokens of the picture, and those of the text


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "x": [new(config.in_channels, 1, *latent[1:]) for _ in range(rows)],
        "t": new(rows),
        "cap_feats": [new(_TEXT_TOKENS, config.cap_feat_dim) for _ in range(rows)],
    }


def _tokens(model: Any, call: dict[str, Any]) -> tuple[Run, ...]:
    """Of each row: picture, its padding, text and the text's, and what longer rows have more."""
    if isinstance(call["x"][0], list):
        raise ValueError(
            "Z-Image gets several pictures for each of its rows, of which pag_fast does not know "
            "which are to be perturbed."
        )
    patch, frames = call.get("patch_size") or 2, call.get("f_patch_size") or 1
    images = [
        x.shape[1] // frames * (x.shape[2] // patch) * (x.shape[3] // patch) for x in call["x"]
    ]
    texts = [len(text) for text in call["cap_feats"]]
    lengths = [_padded(i) + _padded(t) for i, t in zip(images, texts, strict=True)]
    runs = tuple((0, image, max(lengths) - image) for image in images)
    return runs[:1] if len(set(runs)) == 1 else runs


def _padded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


_FUSABLE = frozenset({"ZSingleStreamAttnProcessor"})

DESCRIPTION = ModelDescription(
    "ZImageTransformer2DModel",
    PerturbedStockAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"ZImageTransformerBlock": (Stream("x", (IMAGE, TEXT, PADDING)),)},
    layout=_LAYOUT,
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    tokens=_tokens,
    checkpoints=(Checkpoint("ZImagePipeline", "Z-Image"),),
)
