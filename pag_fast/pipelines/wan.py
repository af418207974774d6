"""Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

from .description import Arguments, PipelineDescription


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    second = getattr(pipe, "_guidance_scale_2", None) if denoiser == "transformer_2" else None
    return float(pipe._guidance_scale if second is None else second)


PIPELINES = (
    PipelineDescription(
        "WanPipeline",
        "injected",
        (r"^blocks\.8\.",),
        "STG, diffusers' community pipeline_stg_wan",
        denoisers=("transformer", "transformer_2"),
        passes="apart",
        scale=_scale,
    ),
)
