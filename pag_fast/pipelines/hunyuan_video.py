"""HunyuanVideo."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription, true_cfg, true_scale

_HUNYUAN_VIDEO = partial(
    PipelineDescription,
    kind="injected",
    layers=(r"^transformer_blocks\.2\.",),
    source="STG, arXiv 2411.18664",
    passes="apart",
    cfg=true_cfg,
    scale=true_scale,
)

PIPELINES = (
    _HUNYUAN_VIDEO("HunyuanVideoPipeline"),
    _HUNYUAN_VIDEO("HunyuanVideoImageToVideoPipeline", base="HunyuanVideoPipeline"),
    _HUNYUAN_VIDEO("HunyuanSkyreelsImageToVideoPipeline", base="HunyuanVideoPipeline"),
)
