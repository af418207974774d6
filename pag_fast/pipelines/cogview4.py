"""CogView4."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_COGVIEW4 = partial(
    PipelineDescription,
    kind="injected",
    layers=(r"^transformer_blocks\.24\.",),
    source="untested with PAG: the layer of diffusers' example of skip-layer guidance (#11205)",
    passes="apart",
)

PIPELINES = (
    _COGVIEW4("CogView4Pipeline"),
    _COGVIEW4("CogView4ControlPipeline", base="CogView4Pipeline"),
)
