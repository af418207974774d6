"""Checking that branches are equal where they are run as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arguments import SAMPLE, UNCHECKED, batched, version_of, with_rows

# guidance is embedded with the timestep, and some loops make its tensor anew in every step; x and t
# are what Z-Image and its kin call latents and timestep
_OF_A_STEP = UNCHECKED | {"guidance", "timesteps", "x", "t"}


class RowEquality:
    """Compares slabs of conditioning tensors once, and again when a tensor has been replaced.

    A comparison waits for the device, so it is made on the first step of a call, and afterwards
    only if a callback has put other tensors in place (or, with ``recheck``, on every step).

    Inference tensors do not tell whether somebody has written into them: they are compared with
    copies, which waits for the device, too, unless ``quiet`` says that nobody could have.

    Attributes:
        by_construction: latents and timesteps of all branches are copies of one row in every step.
            Without it they are compared in each.
    """

    by_construction = True

    def __init__(self, quiet: Callable[[], bool] = lambda: False) -> None:
        self._quiet = quiet
        # the tensors are kept alive: a new tensor can then never have the address of an old one
        self._seen: dict[str, tuple[Any, list[torch.Tensor], list[str]]] = {}
        self._last: dict[str, tuple[int, list[tuple[Any, Any]]]] = {}
        self._copies: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def same_objects(self, call: dict[str, Any], rows: int, context: str = "") -> bool:
        """Whether a call has the very conditioning tensors of the one before, unchanged.

        ``context`` tells passes apart that take turns in a step.
        """
        last, now = self._last.get(context), _conditioning(call)
        self._last[context] = rows, now
        silent = False  # a loop, as a comprehension would be a call in every forward
        for x, own in now:
            silent = silent or (own == -1 and x is not None)
        written = silent and self._are_written(now, context)
        if last is None or last[0] != rows or len(last[1]) != len(now) or written:
            return False
        for (before, version), (x, own) in zip(last[1], now, strict=True):
            if before is not x or version != own:
                return False
        return True

    def _are_written(self, now: list[tuple[Any, Any]], context: str) -> bool:
        """Whether inference tensors hold something else than in the call before."""
        if self._quiet():
            return False
        known = {id(x): (x, copy) for x, copy in self._copies.get(context, ())}
        pairs, written = [], False
        for x in [x for x, own in now if own == -1 and x is not None]:
            before = known.get(id(x))
            if before is None or not torch.equal(*before):
                before, written = (x, x.clone()), True
            pairs += [before]
        self._copies[context] = pairs
        if written:
            self._seen.clear()
        return written

    def leads(self, call: dict[str, Any]) -> bool:
        """Whether a call has the first rows of the conditioning that :meth:`same_objects` saw last.

        Or all of it: the tensors lie in the same memory, and the numbers are equal.
        """
        whole, part = self._last[""][1], _conditioning(call)
        return len(whole) == len(part) and all(map(_leads, whole, part))

    def compared(self, call: dict[str, Any], rows: int, frames: int) -> dict[str, torch.Tensor]:
        """What has to be equal in branches that run as one, by dotted name.

        Timesteps are part of it where they are not equal by construction.
        """
        found = batched(call, rows, frames)
        time = None if self.by_construction else call.get("timestep")
        if isinstance(time, torch.Tensor) and with_rows("timestep", time, rows, frames):
            found["timestep"] = time
        return found

    def differing(
        self,
        tensors: dict[str, torch.Tensor],
        slabs: int,
        first: int,
        second: int,
        *,
        key: str,
        recheck: bool = False,
    ) -> list[str]:
        """Names of the tensors whose slabs ``first`` and ``second`` of ``slabs`` are not equal."""
        lasting = {name: x for name, x in tensors.items() if name not in SAMPLE}
        signature = [(name, *_identity(x)) for name, x in lasting.items()]
        again = recheck or not self.by_construction
        if not again and key in self._seen and self._seen[key][0] == signature:
            return self._seen[key][2]
        names = [
            name
            for name, x in tensors.items()
            if not torch.equal(x.chunk(slabs)[first], x.chunk(slabs)[second])
        ]
        self._seen[key] = signature, list(lasting.values()), names
        return names


def _conditioning(call: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The arguments of a model that last from step to step: tensors with versions, and numbers."""
    found: list[tuple[Any, Any]] = []
    for name, value in call.items():
        if value is not None and name not in _OF_A_STEP and name not in SAMPLE:
            _collect(value, found)
    return found


def _collect(value: Any, found: list[tuple[Any, Any]]) -> None:
    if type(value) is torch.Tensor or isinstance(value, torch.Tensor):
        # version_of, without its call: this runs for every argument of every forward
        found += [(value, -1 if value.is_inference() else value._version)]
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, bool | int | float | str):
        found += [(None, value)]


def _leads(whole: tuple[Any, Any], part: tuple[Any, Any]) -> bool:
    (x, version), (first, own) = whole, part
    if not isinstance(x, torch.Tensor) or not isinstance(first, torch.Tensor):
        return x is first and version == own
    return (
        first.data_ptr() == x.data_ptr()
        and first.stride() == x.stride()
        and first.shape[1:] == x.shape[1:]
        and len(first) <= len(x)
        and version == own
    )


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride(), version_of(x)
