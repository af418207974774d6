"""Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

from .description import UNTESTED, Arguments, PipelineDescription


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    truncated = (step + 1) / arguments["num_inference_steps"] > arguments["cfg_trunc_ratio"]
    return 1.0 if truncated else float(arguments["guidance_scale"])


PIPELINES = (
    PipelineDescription(
        "Lumina2Pipeline",
        "injected",
        (r"^layers\.17\.",),
        UNTESTED,
        passes="apart",
        guidance="normalised",
        normalised_by="cfg_normalization",
        scale=_scale,
    ),
)
