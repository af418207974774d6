"""Krea 2."""

from __future__ import annotations

from typing import Any

from .description import UNTESTED, Arguments, PipelineDescription


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    """Of ``cond + g·(cond − uncond)`` that of ``uncond + g·(cond − uncond)``."""
    return 1.0 + float(pipe.guidance_scale)


PIPELINES = (
    PipelineDescription(
        "Krea2Pipeline",
        "injected",
        (r"^transformer_blocks\.18\.",),
        UNTESTED,
        passes="apart",
        scale=_scale,
    ),
)
