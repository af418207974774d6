"""HunyuanDiT."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_INJECTED = partial(
    PipelineDescription,
    kind="injected",
    layers=("blocks.14",),
    source="diffusers #8936",
    guidance="normalised",
    normalised_by="guidance_rescale",
)

PIPELINES = (
    PipelineDescription(
        "HunyuanDiTPAGPipeline", "pag", ("blocks.16",), "the pipeline's own documentation"
    ),
    _INJECTED("HunyuanDiTPipeline"),
    _INJECTED("HunyuanDiTControlNetPipeline", base="HunyuanDiTPipeline"),
)
