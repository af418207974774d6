"""LTX-2: its own spatio-temporal guidance, made fast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from .description import Arguments, PipelineDescription, StockGuidance


def _changed(pipe: Any, local: Arguments) -> Sequence[int]:
    if not pipe.do_spatio_temporal_guidance:
        return ()
    return local.get("spatio_temporal_guidance_blocks") or ()


_LTX2 = partial(
    PipelineDescription,
    kind="stock",
    source="arXiv 2601.03233",
    stock_guidance=StockGuidance(
        "spatio-temporal guidance",
        "spatio_temporal_guidance_blocks",
        _changed,
        others=("isolate_modalities",),
        with_it=("perturbation_mask",),
    ),
)

PIPELINES = (
    _LTX2("LTX2Pipeline"),
    _LTX2("LTX2ImageToVideoPipeline"),
    _LTX2("LTX2ConditionPipeline"),
    _LTX2("LTX2InContextPipeline"),
    _LTX2("LTX2HDRPipeline"),
)
