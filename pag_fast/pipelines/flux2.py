"""FLUX.2 and FLUX.2 Klein."""

from __future__ import annotations

from functools import partial

from .description import UNTESTED, PipelineDescription

_FLUX2 = partial(PipelineDescription, kind="injected", source=UNTESTED)
_KLEIN = partial(_FLUX2, layers=(r"^single_transformer_blocks\.12\.",))
_VARIANT = partial(_KLEIN, base="Flux2KleinPipeline")

PIPELINES = (
    # distilled for guidance: its scale is an embedding
    _FLUX2("Flux2Pipeline", layers=(r"^single_transformer_blocks\.29\.",), passes="alone"),
    _KLEIN("Flux2KleinPipeline", passes="apart"),
    _VARIANT("Flux2KleinInpaintPipeline", passes="apart"),
    _VARIANT("Flux2KleinKVPipeline", passes="alone"),
)
