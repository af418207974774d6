"""HiDream-I1."""

from __future__ import annotations

from .description import UNTESTED, PipelineDescription

PIPELINES = (
    PipelineDescription(
        "HiDreamImagePipeline",
        kind="injected",
        layers=(r"^single_stream_blocks\.8\.",),
        source=UNTESTED,
    ),
)
