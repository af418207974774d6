"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from .description import Arguments, PipelineDescription, StockGuidance


def _skipped(pipe: Any, local: Arguments) -> Sequence[int]:
    """In the steps that lie between a start and a stop, and with CFG alone."""
    layers = local.get("skip_guidance_layers")
    if layers is None or not pipe.do_classifier_free_guidance:
        return ()
    step, steps = local["i"], local["num_inference_steps"]
    after = step > steps * local["skip_layer_guidance_start"]
    return layers if after and step < steps * local["skip_layer_guidance_stop"] else ()


_SD3 = partial(PipelineDescription, layers=("blocks.13",), source="diffusers #8861")
_CONTROLLED = partial(_SD3, kind="injected", base="StableDiffusion3Pipeline")

PIPELINES = (
    _SD3("StableDiffusion3PAGPipeline", kind="pag"),
    _SD3("StableDiffusion3PAGImg2ImgPipeline", kind="pag"),
    _SD3(
        "StableDiffusion3Pipeline",
        kind="injected",
        stock_guidance=StockGuidance("skip-layer guidance", "skip_layers", _skipped),
    ),
    _SD3("StableDiffusion3Img2ImgPipeline", kind="injected"),
    _SD3("StableDiffusion3InpaintPipeline", kind="injected"),
    _CONTROLLED("StableDiffusion3ControlNetPipeline"),
    _CONTROLLED("StableDiffusion3ControlNetInpaintingPipeline"),
)
