"""Kolors."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_UNET = partial(
    PipelineDescription, layers=("mid",), source="PAG, arXiv 2403.17377", denoisers=("unet",)
)

PIPELINES = (
    _UNET("KolorsPAGPipeline", kind="pag"),
    _UNET("KolorsPipeline", kind="injected"),
    _UNET("KolorsImg2ImgPipeline", kind="injected"),
)
