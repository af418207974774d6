"""Sana."""

from __future__ import annotations

from .description import PipelineDescription

PIPELINES = (
    PipelineDescription("SanaPAGPipeline", "pag", ("transformer_blocks.8",), "NVlabs/Sana"),
    PipelineDescription("SanaPipeline", "injected", ("blocks.8",), "NVlabs/Sana"),
)
