"""Compiling in the first step what a later one needs, with the perturbed branch or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..sharing.arguments import change_rows, latents_of
from .access.forwards import Call, Forward
from .compatibility.findings import Findings
from .guided import Guided

if TYPE_CHECKING:
    from .patch_state import PatchState


class Warming(Guided):
    """As :class:`Guided`, for a denoiser that may be compiled."""

    def __init__(self, pipe: Any, patch: PatchState) -> None:
        super().__init__(pipe, patch)
        self._looked_ahead: set[Any] = set()

    def _prepare(
        self,
        call: Call,
        layout: tuple[str, ...],
        frames: int,
        found: Findings,
        *,
        same: bool,
        step: int,
    ) -> None:
        """Write down, for everything on the model, what the forward that follows runs on."""
        raise NotImplementedError

    def _run(self, forward: Forward, call: Call, found: Findings) -> Any:
        """The model on ``call``."""
        raise NotImplementedError

    def _warm(
        self,
        forward: Forward,
        call: Call,
        layout: tuple[str, ...],
        frames: int,
        found: Findings,
        *,
        dropped: bool,
        without: Call | None = None,
    ) -> None:
        """Compile now, not then, what a later step needs.

        Where this step drops the perturbed branch that is the model with it, else without:
        ``without`` are the arguments that the loop itself gives, if it knows nothing of the branch.
        Strides of theirs, such as of a timestep that is one number for all rows, tell graphs apart.
        """
        compilation, latents, full = self.patch.compilation, latents_of(call), len(layout)
        assert compilation is not None
        key = latents.shape, latents.dtype, full
        if key in compilation.warmed or key in self._looked_ahead:
            return
        self._looked_ahead.add(key)
        if self._difference is None and all(runs != dropped for runs in self._ahead()):
            return
        compilation.warmed.add(key)
        counted = self.patch.steps.copy()
        other = dict(call)
        if not dropped:
            rows = full - len(self.installed.branches)
            if without is None:
                without = change_rows(other, latents.shape[0], frames, full, rows)
            other = dict(without)
            layout = layout[:rows]
        if self.installed.runs is not None:
            self.installed.mark_tokens(other, layout)
        self._prepare(other, layout, frames, found, same=False, step=self.forwards - 1)
        self._run(forward, other, found)
        self.patch.steps = counted
