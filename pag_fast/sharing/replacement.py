"""What stands in the place of a module's ``forward`` while a forward of its owner runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .rows import BranchState
from .threads import HERE

MISSING: Any = object()
"""Stands for an attribute that an instance does not have, so that its class's counts."""


class Replacement:
    """Takes the place of ``vars(module)["forward"]``, and calls what was there for everybody else.

    Whoever wraps a module in the middle of our forward (``add_hook_to_module``, a callback) keeps
    this object when we are gone. So it does something only in the thread of its owner's running
    forward, and not a second time inside of itself; otherwise it calls what was there.

    Instances are made once per patch, as compiled graphs guard on them. A step runs hundreds of
    them, so the test of whose forward runs reads attributes, and calls nothing.

    Args:
        state: of the model, which says whose forward runs.
        module: whose ``forward`` is replaced.

    Attributes:
        rebound: how often one of all replacements has followed its module's class.
    """

    rebound = 0

    def __init__(self, state: BranchState, module: nn.Module) -> None:
        self.state = state
        self.module = module
        own = vars(module).get("forward", MISSING)
        self.displaced: Any = own
        # a bound method is a new object whenever it is asked for, and compiled graphs guard on it
        cls: Any = type(module)
        self._class_forward: Any = cls.forward.__get__(module)
        # what stood there when this object was last put on
        self.original: Callable[..., Any] = self._class_forward if own is MISSING else own
        # what runs for whoever has captured this object while it was on
        self._base = self.original
        # what was there is running, and may be a wrapper that calls this object again
        self._inside = False

    def displace(self, before: Any) -> None:
        """Note what this object takes the place of: the instance's own forward, or ``MISSING``."""
        if before is self.displaced or before is self:
            return
        self.displaced = before
        self.original = self._class_forward if before is MISSING else before
        # what has been put there since may wrap this object, and so must not be its base
        if before is MISSING:
            self._base = self._class_forward

    def rebind(self) -> None:
        """Follow the module's class, on which somebody may have put another function."""
        before, function = self._class_forward, cast(Any, type(self.module)).forward
        if before.__func__ is function:
            return
        Replacement.rebound += 1
        self._class_forward = function.__get__(self.module)
        if self.original is before:
            self.original = self._class_forward
        if self._base is before:
            self._base = self._class_forward

    def came_back(self) -> Any:
        """What belongs in this object's place where somebody has put it back for good."""
        before = MISSING if self._base is self._class_forward else self._base
        self.displace(before)
        return before

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of a model that is made in the middle of our forward has its own forwards."""
        if self._base is self._class_forward:
            return _forward_of_class, (self.module,)
        return _unchanged, (self._base,)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does in its owner's forward."""
        raise NotImplementedError

    def run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What would run without us: the module's own forward, or what somebody has put there."""
        if torch.compiler.is_dynamo_compiling():  # a graph would write the attribute every time
            return self.original(*args, **kwargs)
        self._inside = True
        try:
            return self.original(*args, **kwargs)
        finally:
            self._inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.state.thread is not HERE.me:
            return self._base(*args, **kwargs)
        return self.run(*args, **kwargs)


def _forward_of_class(module: Any) -> Any:
    return type(module).forward.__get__(module)


def _unchanged(value: Any) -> Any:
    return value
