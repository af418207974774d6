"""What a pass was called with, entry by entry, and whether another pass is called with the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .record import Entry

Inputs = dict[str, torch.Tensor]

# how far two batches round one row apart, relative to its norm; another computation is further off
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3}


def rows_of(named: dict[str, Any], rows: slice, batch: int, clone: bool = False) -> Inputs:
    """``rows`` of every tensor in ``named`` that has ``batch`` rows, and the others whole."""
    out: Inputs = {}
    for name, tensor in tensors_of(named):
        part = tensor if tensor.ndim == 0 or tensor.shape[0] != batch else tensor[rows]
        out[name] = part.clone() if clone else part
    return out


def tensors_of(named: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in ``named``, also those in lists."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from tensors_of({f"{name}.{i}": one for i, one in enumerate(value)})


def equal(before: Inputs, now: Inputs, values: bool = True) -> bool:
    """Whether names and shapes are the same, and the values: comparing those waits for the GPU."""
    return before.keys() == now.keys() and all(
        tensor.shape == now[name].shape and (not values or torch.equal(tensor, now[name]))
        for name, tensor in before.items()
    )


def alike(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether two tensors differ by the rounding of another batch, and no more."""
    if before.shape != now.shape:
        return False
    if not before.is_floating_point():
        return torch.equal(before, now)
    difference = (now - before).float().norm()
    return bool(difference <= ROUNDING.get(before.dtype, 2e-2) * before.float().norm())


class Door:
    """Where one call of the model begins to run layers that are shared.

    In the main pass it keeps what the first of them is given, if other nodes act on the model; in
    the perturbed pass it says whether that is given again. A wrapper may run the model several
    times in one call: only the first of them is what was recorded.

    Args:
        entries: of the call, in the order of their rows.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries, self.calls, self.whole = entries, 0, False

    def enter(self, named: dict[str, Any], batch: int) -> None:
        """The first shared layer is about to run on ``batch`` rows, with ``named``."""
        self.calls += 1
        self.whole = self.calls > 1
        if not self.whole and any(entry.doubted for entry in self.entries):
            self.whole = not self._given_again(named, batch)

    @torch.compiler.disable
    def _given_again(self, named: dict[str, Any], batch: int) -> bool:
        rows = batch // len(self.entries)
        for i, entry in enumerate(self.entries):
            now = rows_of(named, slice(i * rows, (i + 1) * rows), batch)
            if entry.door is None or entry.door.keys() != now.keys():
                return False
            if not all(alike(tensor, now[name]) for name, tensor in entry.door.items()):
                return False
        return True
