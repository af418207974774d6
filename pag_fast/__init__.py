"""Perturbed-Attention Guidance without computing anything twice.

import pag_fast

pag_fast.patch(pipe, layers=["mid"])   # with or without PAG of its own
image = pipe(prompt, pag_scale=3).images[0]
print(pag_fast.explain(pipe))
pag_fast.unpatch(pipe)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .analysis.costs import layer_costs
    from .analysis.explain import explain
    from .analysis.verify import verify
    from .config import PatchConfig
    from .patching import patch, patched, supported_pipelines, unpatch
    from .perturbations import Branch
    from .settings.compile_config import CompileConfig
    from .settings.reuse import Reuse
    from .settings.schedules import Schedule, Step

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
    "verify",
]

# where each name is: imported when it is first used, as PyTorch takes a second and more
_MODULES = {
    "Branch": "perturbations",
    "CompileConfig": "settings.compile_config",
    "PatchConfig": "config",
    "Reuse": "settings.reuse",
    "Schedule": "settings.schedules",
    "Step": "settings.schedules",
    "explain": "analysis.explain",
    "layer_costs": "analysis.costs",
    "patch": "patching",
    "patched": "patching",
    "supported_pipelines": "patching",
    "unpatch": "patching",
    "verify": "analysis.verify",
    # diffusers looks here for the class of a guider that was saved; they need a newer diffusers
    "PerturbedAttentionGuidance": "guiders",
    "SkipLayerGuidance": "guiders",
}
_PACKAGES = (
    "analysis",
    "cli",
    "config",
    "fusion",
    "guiders",
    "models",
    "ops",
    "parallel",
    "patching",
    "perturbations",
    "pipelines",
    "processors",
    "runtime",
    "sag",
    "settings",
    "sharing",
    "tools",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
