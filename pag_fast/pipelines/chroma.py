"""Chroma."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_CHROMA = partial(
    PipelineDescription,
    kind="injected",
    layers=(r"^single_transformer_blocks\.0\.",),
    source="untested: that of FLUX.1, which it was made of (ComfyUI-Fluxtapoz, PAGAttention)",
    passes="apart",
)

PIPELINES = (
    _CHROMA("ChromaPipeline"),
    _CHROMA("ChromaImg2ImgPipeline", base="ChromaPipeline"),
    _CHROMA("ChromaInpaintPipeline", base="ChromaPipeline"),
)
