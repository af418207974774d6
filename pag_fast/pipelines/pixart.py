"""PixArt-α and PixArt-Σ."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription, argument_cfg, argument_scale

_PIXART = partial(PipelineDescription, layers=("blocks.14",), source="diffusers #8936")
_INJECTED = partial(_PIXART, kind="injected", cfg=argument_cfg, scale=argument_scale)

PIPELINES = (
    _PIXART("PixArtSigmaPAGPipeline", kind="pag"),
    _INJECTED("PixArtAlphaPipeline"),
    _INJECTED("PixArtSigmaPipeline"),
)
