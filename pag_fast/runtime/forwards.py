"""A model's forward as its owner sees it: arguments by name, and everything put on for it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..sharing.plan import argument_names
from ..sharing.rows import BranchState
from ..sharing.threads import HERE
from .entry import Entry
from .instance_patch import InstancePatch

Call = dict[str, Any]
"""The arguments of a model's forward, by name."""


class Forward:
    """One forward of one model, between its caller and what runs it.

    Positional arguments stay positional, as hooks of others may read them there.
    """

    def __init__(
        self, entry: Entry, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        names = argument_names(model)
        self.entry = entry
        self._positional = names[: len(args)]
        self._rest = args[len(names) :]
        self.call: Call = {**dict(zip(names, args, strict=False)), **kwargs}

    def run(
        self,
        make: Callable[[], InstancePatch],
        states: tuple[BranchState, ...],
        call: Call,
    ) -> Any:
        """Run the model on ``call`` with what ``make`` returns on it.

        Args:
            states: what the objects on the model read; they are this thread's meanwhile.
        """
        kwargs = dict(call)
        args = tuple(kwargs.pop(name) for name in self._positional) + self._rest
        me = HERE.me
        for state in states:
            state.thread = me
        try:
            return self.entry.run(make, args, kwargs)
        finally:
            for state in states:
                state.thread = None
