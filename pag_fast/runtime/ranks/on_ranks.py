"""Sessions of a call that several processes draw together: each runs some of the branches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...models.registry import COND, UNCOND
from ...parallel.agreement import agree_on, settings_of
from ...parallel.ranks import Ranks
from ...sharing.arguments import complete_rows, frames_of, latents_of
from ..access.forwards import Call, Forward
from ..compatibility.answers import Answer
from ..compatibility.findings import Findings
from ..guidance import steps_of_call
from ..injected import InjectedSession
from ..loops.loop import Loop
from ..loops.predictions import prediction_of, with_prediction
from ..session import Session
from ..undoing import undo_all
from .ahead import Ahead

if TYPE_CHECKING:
    from ..patch_state import PatchState

# what looks at all rows of a batch, and would see some of them
_SEES_ALL = (Answer.UNSHARED, Answer.KEEP_ROWS, Answer.RECHECK)


def agree(pipe: Any, patch: PatchState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A call on ranks is about to begin: all of them have the same settings, and all have PAG.

    Raises:
        ValueError: on all ranks, if they have not.
    """
    found: dict[str, Any] = {
        "pag_scale": patch.pag_scale,
        "pag_adaptive_scale": patch.pag_adaptive_scale,
    }
    if patch.host is None:
        with suppress(TypeError):  # arguments that do not fit are the call's to refuse
            bound = inspect.signature(patch.original_class.__call__).bind(pipe, *args, **kwargs)
            bound.apply_defaults()
            given = {**kwargs, **bound.arguments}
            found = {name: given.get(name) for name in found}
    agree_on(patch.config.mesh, settings_of(patch.config) | found, pipe._execution_device)


class OnRanks(Session):
    """As the session that it is mixed into, on this rank's rows; all ranks combine the same."""

    ranks: Ranks

    def __init__(self, pipe: Any, patch: PatchState, *args: Any) -> None:
        super().__init__(pipe, patch, *args)
        self.ranks = Ranks(patch.config.mesh)
        # of the perturbed branches, in the step that begins
        self._scales_now: tuple[float, ...] = ()

    def install(self, layers: Any) -> None:
        super().install(layers)
        self.ranks.branches = len(self.installed.branches)

    def end(self, *, whole: bool) -> None:
        # the frame of a loop that has returned still has its variables
        ran = self._frame if whole and self.forwards else None
        told = [] if ran is None else [partial(self._finish, ran.f_locals)]
        undo_all(*told, partial(super().end, whole=whole))

    def _finish(self, local: Mapping[str, Any]) -> None:
        self.ranks.finish(_drawn(local), local.get("output_type"))

    def _scales_at(self, timestep: Any) -> tuple[float, ...]:
        self._scales_now = super()._scales_at(timestep)
        return self._scales_now

    def _own_rows(
        self, call: Call, layout: tuple[str, ...], frames: int, found: Findings, *, same: bool
    ) -> tuple[tuple[str, ...], bool]:
        """As in :class:`Session`.

        Returns:
            Its branches, and whether their conditioning is that of their forward before.

        Raises:
            ValueError: something on the model has to see all rows, or ranks that do not agree.
        """
        for answer in _SEES_ALL:
            if answer in found.answer:
                raise ValueError(
                    f"{found.why(answer)}: on ranks (mesh=...) it would see some of the rows. Take "
                    "it off, or patch without mesh."
                )
        steps = steps_of_call(self.pipe)
        mine = self.ranks.enter(
            call,
            layout,
            frames,
            self.unit,
            self.installed.state,
            same=same,
            settings=(steps, self.installed.plan.order),
            scales=(*self._scales_now, self._own_rescale(), *_scales_among(self._locals)),
            ahead=self._uncond_ahead(),
        )
        return mine, same

    def _uncond_ahead(self) -> Call | None:
        """Arguments of a forward of uncond by itself, where there is one that can run now."""
        return None

    def _combined(self, out: Any) -> Any:
        return super()._combined(self._gathered(out))

    def _gathered(self, out: Any) -> Any:
        """The output with the predictions of all branches."""
        whole = self.ranks.gathered(prediction_of(out))
        return out if whole is out[0] else with_prediction(out, whole)


def _drawn(local: Mapping[str, Any]) -> list[torch.Tensor]:
    """What a loop leaves: its latents, or all that it has where it calls them otherwise."""
    latents = local["latents"] if "latents" in local else None  # noqa: SIM401
    if isinstance(latents, torch.Tensor):
        return [latents]
    return [x for _, x in sorted(local.items()) if isinstance(x, torch.Tensor)]


def _scales_among(local: Mapping[str, Any]) -> Iterator[float]:
    """The numbers of a loop that it calls scales: every pipeline has some of its own."""
    for name, x in sorted(local.items()):
        if "scale" in name and isinstance(x, int | float):
            yield x


class InjectedOnRanks(OnRanks, InjectedSession):
    """Of a pipeline without PAG. Where uncond is a call of its own it runs ahead on the first rank.

    The first step runs it behind cond, on every rank.
    """

    def __init__(self, pipe: Any, patch: PatchState, denoiser: str, loop: Loop) -> None:
        super().__init__(pipe, patch, denoiser, loop)
        self._foreseen = Ahead(patch.fall_back)
        # arguments of uncond's forward that runs with this one, or what it has returned already
        self._joined: Call | None = None
        self._served: Any = None

    def start(self) -> None:
        super().start()
        self._stock = None  # it goes on from rows of cond, which other ranks have

    def end(self, *, whole: bool) -> None:
        self._joined = self._served = None
        undo_all(self._foreseen.forget, partial(super().end, whole=whole))

    def _pass_of(self, call: Call) -> str:
        if self.arguments() is None:
            raise ValueError(
                f"{type(self.pipe).__name__} runs a loop of its own, and on ranks (mesh=...) it "
                "is not seen whose rows are cond's: run the loop of the class that it inherits "
                "from, or patch without mesh."
            )
        found = super()._pass_of(call)
        self._joined = self._served = None
        if self.host.sequential and found == COND:
            self._joined = self._foreseen.arguments(call)
        elif self.host.sequential and found == UNCOND:
            self._served = self._foreseen.served(call)
        return found

    def _uncond_ahead(self) -> Call | None:
        if self._joined is None:
            return None
        latents = latents_of(self._joined)
        return complete_rows(self._joined, latents.shape[0], frames_of(self._joined))

    def _own_rows(
        self, call: Call, layout: tuple[str, ...], frames: int, found: Findings, *, same: bool
    ) -> tuple[tuple[str, ...], bool]:
        mine, same = super()._own_rows(call, layout, frames, found, same=same)
        if self._joined is not None and mine == (UNCOND,):
            state, rows = self.installed.state, latents_of(call).shape[0]
            same = self._rows.same_objects(self._joined, rows, self._locals, context=UNCOND)
            state.context = UNCOND
            if self._sequence is not None:
                state.num_contexts, state.num_image = self._sequence(self.installed.denoiser, call)
        return mine, same

    def _run(self, forward: Forward, call: Call, found: Findings) -> Any:
        return super()._run(forward, call, found) if self._served is None else self._served

    def _gathered(self, out: Any) -> Any:
        out = super()._gathered(out)
        if self._joined is not None:
            self._joined, prediction = None, prediction_of(out)
            self._foreseen.held = with_prediction(out, prediction[: self.unit])
            out = with_prediction(out, prediction[self.unit :])
        return out
