"""CogVideoX."""

from __future__ import annotations

from typing import Any

from .description import Arguments, PipelineDescription, argument_cfg


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    # with dynamic CFG the pipeline decides on a step's scale behind the denoiser
    return None if arguments.get("use_dynamic_cfg") else float(arguments["guidance_scale"])


PIPELINES = (
    PipelineDescription(
        "CogVideoXPipeline",
        "injected",
        ("blocks.11",),
        "STG, arXiv 2411.18664",
        cfg=argument_cfg,
        scale=_scale,
    ),
)
