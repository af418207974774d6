"""CogVideoX."""

from __future__ import annotations

from functools import partial
from typing import Any

from .description import Arguments, PipelineDescription, argument_cfg


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    # with dynamic CFG the pipeline decides on a step's scale behind the denoiser
    return None if arguments.get("use_dynamic_cfg") else float(arguments["guidance_scale"])


_COGVIDEOX = partial(
    PipelineDescription,
    kind="injected",
    layers=("blocks.11",),
    source="STG, arXiv 2411.18664",
    cfg=argument_cfg,
    scale=_scale,
)

PIPELINES = (
    _COGVIDEOX("CogVideoXPipeline"),
    _COGVIDEOX("CogVideoXImageToVideoPipeline", base="CogVideoXPipeline"),
    _COGVIDEOX("CogVideoXVideoToVideoPipeline", base="CogVideoXPipeline"),
    _COGVIDEOX("CogVideoXFunControlPipeline", base="CogVideoXPipeline"),
)
