"""Sana and Sana Sprint."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_SANA = partial(PipelineDescription, source="NVlabs/Sana")
_INJECTED = partial(_SANA, kind="injected", layers=("blocks.8",))
_DISTILLED = partial(_INJECTED, passes="alone", base="SanaPipeline")

PIPELINES = (
    _SANA("SanaPAGPipeline", kind="pag", layers=("transformer_blocks.8",)),
    _INJECTED("SanaPipeline"),
    _INJECTED("SanaControlNetPipeline", base="SanaPipeline"),
    _DISTILLED("SanaSprintPipeline"),
    _DISTILLED("SanaSprintImg2ImgPipeline"),
)
