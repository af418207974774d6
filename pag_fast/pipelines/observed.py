"""Descriptions of pipelines that nobody has described: what runs is seen in the call."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.registry import uncompiled
from .description import Arguments, PipelineDescription

_DENOISERS = ("unet", "transformer", "transformer_2")


def observed_pipeline(pipe: Any) -> PipelineDescription:
    """The description of a pipeline of an unknown class: passes are seen as they run.

    Raises:
        ValueError: no denoiser, no scheduler, or PAG of its own.
    """
    cls = type(pipe)
    parts = {name: uncompiled(getattr(pipe, name, None)) for name in _DENOISERS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    has_pag = any(base.__name__ == "PAGMixin" for base in cls.__mro__)
    home = next((base for base in cls.__mro__ if "__call__" in vars(base)), None)
    steps = hasattr(getattr(pipe, "scheduler", None), "step")
    if has_pag or not found or not steps or home is None:
        raise ValueError(f"{cls.__name__} has no loop with a denoiser and scheduler.")
    return PipelineDescription(
        home.__name__,
        kind="injected",
        denoisers=tuple(found),
        passes="observed",
        cfg=_unknown_cfg,
        scale=_unknown_scale,
    )


def _unknown_cfg(pipe: Any, arguments: Arguments) -> bool:
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def _unknown_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    return None
