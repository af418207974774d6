"""Z-Image."""

from __future__ import annotations

from functools import partial
from typing import Any

from .description import UNTESTED, Arguments, PipelineDescription


def _scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    """Of ``cond + g·(cond − uncond)`` that of ``uncond + g·(cond − uncond)``."""
    return 1.0 + float(pipe.guidance_scale)


_Z_IMAGE = partial(
    PipelineDescription,
    kind="injected",
    layers=(r"^layers\.20\.",),
    source=UNTESTED,
    rows=("cond", "uncond"),
    guidance="normalised",
    normalised_by="cfg_normalization",
    scale=_scale,
)

PIPELINES = (
    _Z_IMAGE("ZImagePipeline"),
    _Z_IMAGE("ZImageImg2ImgPipeline", base="ZImagePipeline"),
    _Z_IMAGE("ZImageInpaintPipeline", base="ZImagePipeline"),
)
