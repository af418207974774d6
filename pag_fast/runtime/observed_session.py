"""A call of a pipeline that nobody has described: its loop is looked at as it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import COND, UNCOND, uncompiled
from ..models.traced.description import derive
from ..sharing.arguments import latents_of
from .forwards import Call
from .frames import calling_pipeline
from .injected import InjectedSession
from .loop import Loop
from .observed import ObservedLoop
from .traced import TracedSession

if TYPE_CHECKING:
    from .patch_state import PatchState


class ObservedSession(InjectedSession):
    """As :class:`InjectedSession`, with passes and rows that :class:`ObservedLoop` sees."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._observed = ObservedLoop(self.pipe, self.patch.fall_back)
        self._arrived: Call = {}

    def end(self, *, whole: bool) -> None:
        self.patch.seen_of_loop.update(self._observed.seen)
        self._arrived = {}
        super().end(whole=whole)

    def _pass_of(self, call: Call) -> str:
        key = self._steps.key(call, self._locals, self.forwards)
        if self._seen[0] != key:
            self._seen = key, []
        self._observed.check(key, self._locals)
        rows, seen = latents_of(call).shape[0], self._seen[1]
        found = self._observed.pass_of(call, rows, self._locals, seen)
        if found in seen and found == COND:
            self._tell_of_repeats()
        seen.append(found)
        self._arrived = call
        return found

    def arrives(self, call: Call) -> None:
        self._arrived = call
        self._locals = self._locals or calling_pipeline()[1]

    def layout(self, rows: int) -> tuple[str, ...]:
        found = self._observed.layout(self._arrived, rows, self._locals)
        self.unit, self._cond_first = rows // len(found), self._observed.cond_first
        return found

    def _result(self, out: Any, predictions: list[torch.Tensor]) -> Any:
        names = (UNCOND, COND)[-len(predictions) :] if self._pass == COND else (self._pass,)
        self._observed.gave(self._seen[0], names, predictions)
        return super()._result(out, predictions)


class ObservedTracedSession(ObservedSession, TracedSession):
    """Neither the pipeline nor its denoiser is described."""


# by whether the pipeline is observed, and its denoiser traced
_KINDS: dict[tuple[bool, bool], type[InjectedSession]] = {
    (False, False): InjectedSession,
    (False, True): TracedSession,
    (True, False): ObservedSession,
    (True, True): ObservedTracedSession,
}


def session_of(pipe: Any, patch: PatchState, denoiser: str, loop: Loop) -> InjectedSession:
    """A session for one denoiser of a pipeline without PAG."""
    assert patch.host is not None
    derived = derive(uncompiled(getattr(pipe, denoiser))).is_derived
    return _KINDS[patch.host.is_observed, derived](pipe, patch, denoiser, loop)
