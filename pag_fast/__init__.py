"""Perturbed-Attention Guidance without computing anything twice.

import pag_fast

pag_fast.patch(pipe, layers=["mid"])   # with or without PAG of its own
image = pipe(prompt, pag_scale=3).images[0]
print(pag_fast.explain(pipe))
pag_fast.unpatch(pipe)
"""

from __future__ import annotations

from typing import Any

from .analysis.costs import layer_costs
from .analysis.explain import explain
from .config import PatchConfig
from .patching import patch, patched, supported_pipelines, unpatch
from .perturbations import Branch
from .settings.compile_config import CompileConfig
from .settings.reuse import Reuse
from .settings.schedules import Schedule, Step
from .version import __version__

__all__ = [
    "Branch",
    "CompileConfig",
    "PatchConfig",
    "Reuse",
    "Schedule",
    "Step",
    "__version__",
    "explain",
    "layer_costs",
    "patch",
    "patched",
    "supported_pipelines",
    "unpatch",
]

# diffusers looks here for the class of a guider that was saved; they need a newer diffusers
_GUIDERS = ("PerturbedAttentionGuidance", "SkipLayerGuidance")


def __getattr__(name: str) -> Any:
    if name in _GUIDERS:
        from . import guiders

        return getattr(guiders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
