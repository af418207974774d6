"""Nodes of the tests: tiny models and latents as pictures, so that a server needs no weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io

# the server's custom_nodes has a link to this folder
sys.path.append(str(Path(__file__).resolve().parent.parent))
import tiny


class TinyModel(io.ComfyNode):
    """A model of ``tiny.NAMES``, a positive and a negative conditioning, and an empty latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyModel",
            category="test",
            inputs=[
                io.Combo.Input("name", options=list(tiny.NAMES)),
                io.Int.Input("controls", default=0, min=0, max=2),
            ],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output("positive"),
                io.Conditioning.Output("negative"),
                io.Latent.Output(),
            ],
        )

    @classmethod
    def execute(cls, name: str, controls: int) -> io.NodeOutput:
        model = tiny.build(name)
        chosen = [tiny.controlnet(model, seed) for seed in range(controls)]
        positive, negative = tiny.controlled(model, *chosen)
        if not controls:
            positive, negative = model.positive, model.negative
        return io.NodeOutput(model.model, positive, negative, {"samples": torch.zeros(model.shape)})


class LatentAsImage(io.ComfyNode):
    """The first three channels of a latent, each stretched to 0 to 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentAsImage",
            category="test",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        latent = samples["samples"][:, :3].float()
        if latent.ndim == 5:  # a video: its first frame
            latent = latent[:, :, 0]
        low, high = latent.amin((-2, -1), True), latent.amax((-2, -1), True)
        return io.NodeOutput(((latent - low) / (high - low)).movedim(1, -1))


class Extension(ComfyExtension):
    """What ComfyUI asks for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyModel, LatentAsImage]


async def comfy_entrypoint() -> Extension:
    return Extension()
