"""``WanVACETransformer3DModel``: Wan VACE, a second list of blocks that reads the control."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors import PerturbedVideoAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout
from . import wan
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

# what a block of the control gives is added behind a block, on as many rows
_LAYOUT = Layout(("blocks",), ("attn1",), before=("vace_blocks",), whole_between=True)
_1300M: dict[str, Any] = {**wan.SMALL, "vace_layers": list(range(0, 30, 2))}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    return {
        **wan.DESCRIPTION.inputs(model, new, rows, latent),
        "control_hidden_states": new(rows, model.config.vace_in_channels, *latent),
    }


DESCRIPTION = ModelDescription(
    "WanVACETransformer3DModel",
    PerturbedVideoAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"WanTransformerBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    replaces=wan.DESCRIPTION.replaces,
    fusable_processors=wan.DESCRIPTION.fusable_processors,
    checkpoints=(
        Checkpoint("WanVACEPipeline", "Wan 2.1 VACE 14B", **wan.SIZE),
        Checkpoint("WanVACEPipeline", "Wan 2.1 VACE 1.3B", _1300M, **wan.SIZE, variant="1.3B"),
    ),
)
