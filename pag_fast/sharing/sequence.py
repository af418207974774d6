"""In which order a model's modules have to run, for what its plan shares to be right.

A plan that was read off one forward holds for forwards that run the same modules in the same order.
A model may leave some out, or run them in another order, at later timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .rows import BranchState


class OutOfOrder(RuntimeError):
    """A module ran where what is shared in front of it, or behind it, is not right."""


class Sequence:
    """Where a forward is among the modules that rest on each other.

    Args:
        places: ``(name, arrives, leaves)`` of the modules in front of the fork, and behind them of
            the perturbed layers, in order: whether each is given all rows, and hands on all. One
            that is left out is missed by those alone that are given, or hand on, fewer.
    """

    def __init__(self, places: Iterable[tuple[str, bool, bool]]) -> None:
        named = enumerate(places)
        self._places = {name: (at, arrives, leaves) for at, (name, arrives, leaves) in named}
        self.begin()

    def begin(self) -> None:
        """A forward begins."""
        self._reached, self._whole = -1, True

    def enter(self, name: str) -> None:
        """A module begins.

        Raises:
            OutOfOrder: it has run already, or behind one that it has to run in front of, or without
                one that it follows.
        """
        place = self._places.get(name)
        if place is None:  # nothing rests on it
            return
        at, arrives, leaves = place
        follows = at == self._reached + 1 or (at > self._reached and arrives and self._whole)
        if not follows:
            raise OutOfOrder(f"{name} ran in another order than in the forward that was traced")
        self._reached, self._whole = at, leaves

    def end(self) -> None:
        """A forward has ended.

        Raises:
            OutOfOrder: it has fewer rows than it should, as the modules that add them did not run.
        """
        if not self._whole:
            raise OutOfOrder("blocks did not run that ran in the forward that was traced")


class Entered:
    """Forward pre-hook of a module that has its place in a sequence."""

    def __init__(self, state: BranchState, name: str) -> None:
        self.state = state
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        note(self.state, self.name)


def note(state: BranchState, name: str) -> None:
    """A module begins; where nothing is shared any order is right, and graphs have their own."""
    slabs, sequence = state.slabs, state.sequence
    if sequence is None or slabs is None or torch.compiler.is_compiling():
        return
    if slabs[1] != slabs[2]:
        sequence.enter(name)
