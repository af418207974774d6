"""LTX-Video."""

from __future__ import annotations

from .description import PipelineDescription

PIPELINES = (
    PipelineDescription(
        "LTXPipeline",
        "injected",
        ("blocks.19",),
        "LTX-Video 2B's own configuration of STG",
        guidance="normalised",
        normalised_by="guidance_rescale",
    ),
)
