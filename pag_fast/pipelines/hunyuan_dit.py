"""HunyuanDiT."""

from __future__ import annotations

from .description import PipelineDescription

PIPELINES = (
    PipelineDescription(
        "HunyuanDiTPAGPipeline", "pag", ("blocks.16",), "the pipeline's own documentation"
    ),
    PipelineDescription(
        "HunyuanDiTPipeline",
        "injected",
        ("blocks.14",),
        "diffusers #8936",
        guidance="normalised",
        normalised_by="guidance_rescale",
    ),
)
