"""Forwards between hooks of ours: how rows change in front of a module and behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...sharing.replacement import Replacement
from ...sharing.rows import BranchState
from .instance_patch import Entry


def forward_entries(state: BranchState, hooks: Iterable[tuple[nn.Module, Any, Any]]) -> list[Entry]:
    """The hooks of each module as one :class:`HookedForward`, ready for an instance patch."""
    grouped: dict[int, tuple[nn.Module, list[tuple[Any, Any]]]] = {}
    for module, before, after in hooks:
        grouped.setdefault(id(module), (module, []))[1].append((before, after))
    return [
        (vars(module), "forward", HookedForward(state, module, pairs))
        for module, pairs in grouped.values()
    ]


class HookedForward(Replacement):
    """A forward between hooks that change its rows; not torch's hooks, which graphs do not guard.

    Args:
        hooks: ``(before, after)`` with the signatures of a pre-hook with keyword arguments and of
            a forward hook, both in the order in which torch would run them.
    """

    def __init__(self, state: BranchState, module: nn.Module, hooks: list[tuple[Any, Any]]) -> None:
        super().__init__(state, module)
        self._before_forward = tuple(before for before, _ in hooks if before is not None)
        self._after_forward = tuple(after for _, after in hooks if after is not None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        for before in self._before_forward:
            changed = before(self.module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        out = self.run_original(args, kwargs)
        for after in self._after_forward:
            changed = after(self.module, args, out)
            if changed is not None:
                out = changed
        return out
