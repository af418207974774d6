"""Wan 2.1 and 2.2."""

from __future__ import annotations

from functools import partial
from typing import Any

from .description import Arguments, PipelineDescription


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    second = getattr(pipe, "_guidance_scale_2", None) if denoiser == "transformer_2" else None
    return float(pipe._guidance_scale if second is None else second)


_WAN = partial(
    PipelineDescription,
    kind="injected",
    layers=(r"^blocks\.8\.",),
    source="STG, diffusers' community pipeline_stg_wan",
    passes="apart",
)
_TWO = ("transformer", "transformer_2")

PIPELINES = (
    _WAN("WanPipeline", denoisers=_TWO, scale=_scale),
    _WAN("WanImageToVideoPipeline", denoisers=_TWO, scale=_scale, base="WanPipeline"),
    _WAN("WanVideoToVideoPipeline", base="WanPipeline"),
    _WAN("WanVACEPipeline", denoisers=_TWO, scale=_scale),
)
