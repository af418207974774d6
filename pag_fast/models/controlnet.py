"""``ControlNetModel``, of Stable Diffusion 1 to XL."""

from __future__ import annotations

from .description import ControlNetDescription
from .unets import unet_inputs

CONTROLNET = ControlNetDescription(
    "ControlNetModel",
    inputs=unet_inputs,
    blocks=("BasicTransformerBlock",),
    fusable_processors=frozenset({"AttnProcessor", "AttnProcessor2_0"}),
)
