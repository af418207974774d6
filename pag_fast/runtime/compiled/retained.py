"""What compiled graphs guard on, kept for as long as there are graphs.

A graph knows the forwards that it was traced with by identity. Made anew by every ``patch``, they
would have a compiled model traced again whenever it is patched, until its compiler gives up. So
what a patch leaves behind stays with the compiled function, and goes when that goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ...models.registry import uncompiled
from ...sharing.plan import compiled_call, is_compiled

if TYPE_CHECKING:
    from ..controlnets import InstalledControlNets
    from ..installation import Installation
    from ..patch_state import PatchState

_NAME = "_pag_fast_made"
# of settings that take turns
_MOST = 8


@dataclass
class _Made:
    """What was made for one model with some settings; models are named as in the patch state."""

    settings: Any
    installed: dict[Any, tuple[Any, Installation]] = field(default_factory=dict)
    fusions: dict[int, Any] = field(default_factory=dict)
    controlnets: tuple[Any, InstalledControlNets] | None = None


def leave_behind(state: PatchState, models: list[Any]) -> None:
    """Leave with the graphs of each model what ``state`` has made for it, and has no longer."""
    for model in models:
        graphs, inner = _graphs(model), id(uncompiled(model))
        if graphs is None:
            continue
        made = _Made(state.config.installed)
        made.installed = _taken(state._installed, [k for k in state._installed if k[0] == inner])
        made.fusions = _taken(state._fusions, [k for k in state._fusions if k == inner])
        nets = state._controlnets
        if nets is not None and nets[0][0] == id(model):
            made.controlnets, state._controlnets = nets, None
        kept = vars(graphs).setdefault(_NAME, [])
        kept.append(made)
        del kept[:-_MOST]


def take_over(state: PatchState, models: list[Any]) -> None:
    """Have ``state`` use what earlier patches with the same settings have left with ``models``."""
    for model in models:
        kept: list[_Made] = getattr(_graphs(model), _NAME, [])
        for made in [x for x in kept if x.settings == state.config.installed]:
            kept.remove(made)
            state._installed.update(made.installed)
            state._fusions.update(made.fusions)
            if made.controlnets is not None:
                state._controlnets = made.controlnets
                made.controlnets[1].patch = state


def _graphs(model: nn.Module) -> Any:
    """What holds the graphs of a model, or of the first of its compiled blocks; ``None``: none."""
    found: Any = None
    for module in model.modules():
        found = vars(module).get("dynamo_ctx")  # of what torch.compile(module) returns
        if found is None and is_compiled(module):
            found = compiled_call(module) or vars(module)["forward"]
        if found is not None:
            break
    return found if hasattr(found, "__dict__") else None


def _taken(found: dict[Any, Any], keys: list[Any]) -> dict[Any, Any]:
    return {key: found.pop(key) for key in keys}
