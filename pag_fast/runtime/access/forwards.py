"""A model's forward as its owner sees it: arguments by name, and everything put on for it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...sharing.plan import argument_names
from ...sharing.rows import BranchState
from ...sharing.threads import HERE
from .entry import Entry
from .instance_patch import InstancePatch

Call = dict[str, Any]
"""The arguments of a model's forward, by name."""

Views = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Arguments, by name, and views of them with their rows in front."""


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
        self._turned: tuple[str, ...] = ()

    def turn(self, names: tuple[str, ...], views: Views) -> None:
        """Have rows in front in arguments where the model has them in the second dimension.

        ``views`` are those of earlier forwards: what is the same tensor again stays the same.
        """
        self._turned = names
        for name in names:
            own = self.call.get(name)
            if isinstance(own, torch.Tensor):
                if name not in views or views[name][0] is not own:
                    views[name] = own, own.transpose(0, 1)
                self.call[name] = views[name][1]

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
        for name in self._turned:
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].transpose(0, 1)
        args = tuple(kwargs.pop(name) for name in self._positional) + self._rest
        me = HERE.me
        for state in states:
            state.thread = me
        try:
            return self.entry.run(make, args, kwargs)
        finally:
            for state in states:
                state.thread = None
