"""Where a pipeline's denoising loop is, as far as its forwards show."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from ..access.forwards import Call
from ..guidance import Place, own_place


@dataclass
class Loop:
    """Where the denoising loop is, for all denoisers of the pipeline.

    Attributes:
        step: number of the step, from 0; -1 before the first.
        scales: what has been read of the scheduler (:func:`pag_fast.runtime.guidance.scale_at`).
        frame: of the running loop.
    """

    step: int = -1
    scales: dict[Any, Any] = field(default_factory=dict)
    frame: FrameType | None = None

    def begin(self, frame: FrameType | None) -> None:
        """A loop begins; a subclass may run several in a call."""
        self.step, self.frame = -1, frame
        self.scales.clear()


class StepClock:
    """Tells the steps of a loop apart, by what its locals and its scheduler count."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        # of schedulers that do not count their steps: the loop's own, and how many there were
        self._timestep: Any = None
        self._turn = 0

    def key(self, call: Call, found: dict[str, Any], forwards: int) -> Any:
        """Another value in every step.

        Args:
            call: arguments of the forward that begins.
            found: the loop's locals.
            forwards: how many there were, where nothing else tells them apart.
        """
        scheduler = self._pipe.scheduler
        # a loop that was copied may count by another name, and have an i of its own
        index, stepped = found.get("i"), getattr(scheduler, "step_index", None)
        timestep = found.get("t")
        if hasattr(scheduler, "step_index"):
            timestep = None
        elif timestep is not self._timestep:
            self._timestep, self._turn = timestep, self._turn + 1
        if isinstance(index, int) or stepped is not None or timestep is not None:
            return index if isinstance(index, int) else None, stepped, self._turn
        at = call.get("timestep", found.get("t"))
        if isinstance(at, torch.Tensor):
            at = at.flatten()[0]
        return forwards if at is None else float(at)


def unstepped(pipe: Any, loop: Loop, call: Call, found: dict[str, Any], *, wanted: bool) -> Any:
    """The timestep where the scheduler counts no steps: before its first, or if nobody steps it.

    Args:
        found: the loop's locals.
        wanted: the PAG scale depends on it.

    Raises:
        ValueError: the loop makes its steps itself, and does not show where it is.
    """
    begin = getattr(pipe.scheduler, "begin_index", None)
    first = loop.step == 0
    if first and begin is not None:
        return Place(begin)
    if not wanted:
        return call.get("timestep", found.get("t", 0.0))
    for at in (found.get("t"), call.get("timestep")):
        own = own_place(pipe, at, loop.scales)
        if own is not None:
            return own
    if first:
        return Place(0)
    raise ValueError(
        "The loop makes its steps without its scheduler, and neither its t nor the denoiser's "
        "timestep is one of the scheduler's: which step that is cannot be told. Patch with "
        "schedule=None and pag_adaptive_scale=0.0, or call the scheduler's step()."
    )
