"""Whether a forward is of a later step than the one before it, as far as its loop shows."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from ..access.forwards import Call

LATER, SAME, EARLIER = 1, 0, -1

SEVERAL = (
    "reuse is off in this call: its loop runs cond several times in a step, or does not show that "
    "the steps are others, and one forward's difference would serve another one. Every step runs "
    "its perturbed branch"
)


class StepOrder:
    """Compares the step of each forward of cond with that of the forward before.

    Views and windows run cond several times in a step, and FreeInit and windows in time begin the
    steps anew in one frame. Python's ``i`` tells neither: a loop may count its views by it.
    """

    def __init__(self) -> None:
        self._before: tuple[Any, int | None, float | None] | None = None

    def look(self, scheduler: Any, call: Call, found: dict[str, Any]) -> int:
        """``LATER``, ``SAME`` or ``EARLIER``; ``SAME`` too where nothing tells.

        Args:
            call: arguments of the forward that begins.
            found: the loop's locals.
        """
        t, index = found.get("t"), getattr(scheduler, "step_index", None)
        index = index if isinstance(index, int) else None
        shows = index is not None or isinstance(t, torch.Tensor | Real)
        # the device is asked for the denoiser's timestep where the loop has no other
        at = None if shows else _number(call.get("timestep"))
        before, self._before = self._before, (t, index, at)
        if before is None:
            return LATER
        by_time, by_index = _of_times(before[0], t), _of_indices(before[1], index)
        # an index that goes back in a step is that of another view
        if by_time == SAME:
            return SAME
        if EARLIER in (by_time, by_index):
            return EARLIER
        told = by_time or by_index
        if told is None:
            numbers = (before[2], at) if at is not None else (_number(before[0]), _number(t))
            told = _of_numbers(*numbers)
        return told or SAME


def _of_times(before: Any, now: Any) -> int | None:
    """By the loop's ``t``; ``None`` where that is not told without waiting for the device.

    A loop takes its ``t`` out of the scheduler's timesteps, and where it lies there tells steps
    apart that have one timestep, as those of PNDM.
    """
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        if before is now:
            return SAME
        if before.untyped_storage().data_ptr() == now.untyped_storage().data_ptr():
            return _sign(int(now.storage_offset() - before.storage_offset()))
        if "cpu" not in (before.device.type, now.device.type):
            return None
    # one timestep in two steps, or one step: the scheduler's index tells
    return _of_numbers(_number(before), _number(now)) or None


def _of_numbers(before: float | None, now: float | None) -> int | None:
    """By timesteps, which fall."""
    return None if before is None or now is None else _sign(before - now)


def _of_indices(before: int | None, now: int | None) -> int | None:
    """By the scheduler's steps; it has none in front of the first."""
    if before is None and now is None:
        return None
    return _sign((-1 if now is None else now) - (-1 if before is None else before))


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _number(x: Any) -> float | None:
    if isinstance(x, torch.Tensor):
        return float(x.flatten()[0]) if x.numel() else None
    return float(x) if isinstance(x, Real) else None
