"""HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

from .description import UNTESTED, Arguments, PipelineDescription


def _cfg(pipe: Any, arguments: Arguments) -> bool:
    return bool(pipe.guider.num_conditions > 1)


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    return None


PIPELINES = (
    PipelineDescription(
        "HunyuanVideo15Pipeline",
        "injected",
        (r"^transformer_blocks\.36\.",),
        UNTESTED,
        # a guider of the user's choice decides how often the denoiser runs, and guides by that
        passes="observed",
        cfg=_cfg,
        scale=_scale,
    ),
)
