"""Pipelines that the sweep leaves out, and why."""

from __future__ import annotations

_BASE = "every pipeline's base class"
_TEXT = "it makes text"
_TRIED: dict[str, tuple[str, ...]] = {
    _BASE: ("DiffusionPipeline",),
    _TEXT: ("DiffusionGemmaPipeline", "LLaDA2Pipeline"),
    "its preprocessing needs torchvision": ("OmniGenPipeline",),
}
NOT_TRIED = {name: reason for reason, names in _TRIED.items() for name in names}
NO_TIME = "no tiny pipeline of it has been made"
