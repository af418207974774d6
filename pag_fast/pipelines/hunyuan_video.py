"""HunyuanVideo."""

from __future__ import annotations

from .description import PipelineDescription, true_cfg, true_scale

PIPELINES = (
    PipelineDescription(
        "HunyuanVideoPipeline",
        "injected",
        (r"^transformer_blocks\.2\.",),
        "STG, arXiv 2411.18664",
        passes="apart",
        cfg=true_cfg,
        scale=true_scale,
    ),
)
