"""A call of a pipeline that nobody has described: its loop is looked at as it runs."""

from __future__ import annotations

from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import COND, PERTURBED, uncompiled
from ..models.traced.description import derive
from ..sharing.arguments import latents_of
from .access.forwards import Call
from .access.frames import calling_frame, is_loop_of
from .injected import InjectedSession
from .loops.loop import Loop
from .loops.observed import ObservedLoop
from .traced import TracedSession
from .undoing import undo_all

if TYPE_CHECKING:
    from .patch_state import PatchState


class ObservedSession(InjectedSession):
    """As :class:`InjectedSession`, with passes and rows that :class:`ObservedLoop` sees.

    Attributes:
        what: why the loop is looked at, for errors.
        would: what would help.
    """

    what = "has no description in pag_fast"
    would = "A description can be added, see CONTRIBUTING.md."

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._observed = ObservedLoop(self.pipe, self.patch.fall_back, self.what, self.would)
        self._arrived: Call = {}
        # whose locals show what has become of the predictions
        self._looked_at: FrameType | None = None

    def end(self, *, whole: bool) -> None:
        guidance = self._observed.guidance
        finish = [partial(guidance.finish, self._loop_locals())] if whole else []
        undo_all(*finish, guidance.forget, self._note, partial(super().end, whole=whole))

    def _note(self) -> None:
        self.patch.seen_of_loop.update(self._observed.seen | self._observed.guidance.seen)
        self._arrived, self._looked_at = {}, None

    def _loop_locals(self) -> dict[str, Any]:
        """The locals of the loop that the latest step was of, which may be over."""
        return {} if self._looked_at is None else self._looked_at.f_locals

    def _pass_of(self, call: Call) -> str:
        key = self._steps.key(call, self._locals, self.forwards)
        if self._seen[0] != key:
            self._observed.guidance.step_over(self._loop_locals())
            self._seen, self._looked_at = (key, []), self._frame
        rows, seen = latents_of(call).shape[0], self._seen[1]
        found = self._observed.pass_of(call, rows, self._locals, seen)
        if found == COND and COND in seen:
            # of other latents: what follows it has its difference
            self._observed.guidance.round_over(self._locals)
            self._seen = key, []
        self._seen[1].append(found)
        self._arrived = call
        return found

    def arrives(self, call: Call) -> None:
        self._arrived = call
        frame = calling_frame()[1]
        if not self._locals and frame is not None:
            self._locals = frame.f_locals

    def layout(self, rows: int) -> tuple[str, ...]:
        found = self._observed.layout(self._arrived, rows, self._locals)
        self.unit, self._cond_first = rows // len(found), self._observed.cond_first
        return found

    def _combined(self, out: Any) -> Any:
        given = super()._combined(out)
        # a list of rows comes by here as one tensor before
        if self._is_observed() and isinstance(given[0], torch.Tensor):
            self._give(given[0])
        return given

    def _is_observed(self) -> bool:
        return True

    def equal_by_construction(self) -> bool:
        return not self._is_observed() and super().equal_by_construction()

    def _give(self, prediction: torch.Tensor) -> None:
        """Tell what looks at the loop's guidance of what the loop gets."""
        names, active = [self._pass], self._pending is not None
        if self._pass == COND:
            assert self.ran is not None
            names = [branch for branch in self.ran[0] if branch != PERTURBED]
            active = any(self.ran[1])
        if self._cond_first and len(names) > 1:
            names = names[::-1]
        self._observed.guidance.gave(
            names,
            list(prediction.chunk(len(names))),
            self._locals,
            active=active,
            assumed=self._observed.assumed,
        )


class ObservedTracedSession(ObservedSession, TracedSession):
    """Neither the pipeline nor its denoiser is described."""


class OwnLoopSession(ObservedSession):
    """Of a class with a ``__call__`` of its own; that may run the described loop all the same."""

    what = "runs a loop of its own"
    would = "Have it run uncond, and cond behind it, as the loops of diffusers do."

    # whose loop the forward that runs is of: it is looked up once, when that arrives
    _kind: type[InjectedSession] = InjectedSession

    def _look(self) -> None:
        self._kind = ObservedSession if self.arguments() is None else InjectedSession

    def arrives(self, call: Call) -> None:
        super().arrives(call)
        self._look()

    def _pass_of(self, call: Call) -> str:
        self._look()
        return self._kind._pass_of(self, call)

    def layout(self, rows: int) -> tuple[str, ...]:
        return self._kind.layout(self, rows)

    def _is_observed(self) -> bool:
        return self._kind is not InjectedSession

    def _cfg(self) -> bool:
        if self._kind is InjectedSession:
            return super()._cfg()
        return self._observed.uses_cfg(self._locals)


class OwnLoopTracedSession(OwnLoopSession, TracedSession):
    """As :class:`OwnLoopSession`, with a denoiser that nobody has described."""


# by whose loop it is, and whether the denoiser is traced
_KINDS: dict[tuple[str, bool], type[InjectedSession]] = {
    ("described", False): InjectedSession,
    ("described", True): TracedSession,
    ("observed", False): ObservedSession,
    ("observed", True): ObservedTracedSession,
    ("own", False): OwnLoopSession,
    ("own", True): OwnLoopTracedSession,
}


def session_of(pipe: Any, patch: PatchState, denoiser: str, loop: Loop) -> InjectedSession:
    """A session for one denoiser of a pipeline without PAG."""
    assert patch.host is not None
    derived = derive(uncompiled(getattr(pipe, denoiser))).is_derived
    whose = "observed" if patch.host.is_observed else "described"
    if whose == "described" and not is_loop_of(patch.original_class, patch.described):
        whose = "own"
    return _KINDS[whose, derived](pipe, patch, denoiser, loop)
