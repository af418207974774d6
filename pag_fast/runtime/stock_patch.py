"""A patched pipeline that gets no PAG: its own guidance is resumed, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import PatchConfig
from ..models.registry import uncompiled
from ..pipelines.description import StockGuidance
from ..pipelines.registry import denoiser_names, describe_pipeline
from .access.entry import Entry
from .access.forwards import Forward
from .access.frames import calling_frame, diffusers_class, know_loops, loop_of
from .basic_state import BasicState
from .stock_passes import StockPasses
from .undoing import undo_all


class StockSession:
    """The state of one running call, for one denoiser.

    Attributes:
        pag: there is none.
    """

    pag = False

    def __init__(
        self, pipe: Any, patch: BasicState, denoiser: str, guidance: StockGuidance
    ) -> None:
        self.pipe = pipe
        self.patch = patch
        self.denoiser = denoiser
        self.owner = f"{type(pipe).__name__} (patched)"
        model = getattr(pipe, denoiser)
        self._model: Any = uncompiled(model)
        self._passes = StockPasses(patch, pipe, model, guidance)
        self._locals: dict[str, Any] = {}
        self._loop_code = loop_of(diffusers_class(pipe))
        self._running_forward = False

    def owns(self) -> bool:
        """Whether the forward that begins is one of this call's denoising loop."""
        # what a hook in the middle of our forward runs is nobody's
        if self._running_forward:
            return False
        pipe, frame = calling_frame(self._loop_code)
        self._locals = {}
        if frame is None or pipe is not self.pipe:
            return False
        self._locals = frame.f_locals
        return True

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the denoiser, on what its loop has given it."""
        forward = Forward(entry, self._model, args, kwargs)
        found = self.patch.look(self._model)
        self._running_forward = True
        try:
            patch = self._passes.enter(forward.call, self._locals, found)
            return self._passes.run(forward, lambda: patch, (), forward.call)
        finally:
            self._running_forward = False
            self._locals = {}

    def end(self) -> None:
        """The call is over, one way or another."""
        self._passes.forget()


def stock_sessions(pipe: Any, patch: BasicState, guidance: StockGuidance) -> dict[str, Any]:
    """A session for each denoiser, by its attribute."""
    return {
        name: StockSession(pipe, patch, name, guidance)
        for name in denoiser_names(pipe)
        if getattr(pipe, name, None) is not None
    }


class StockPatch(BasicState):
    """As :class:`pag_fast.runtime.patch_state.PatchState`, of a pipeline that gets no PAG."""

    def __init__(self, pipe: Any, config: PatchConfig) -> None:
        before = getattr(pipe, "_pag_fast", None)
        self.original_class: type = type(pipe) if before is None else before.original_class
        super().__init__(config)
        know_loops(self.original_class)
        guidance = describe_pipeline(pipe).stock_guidance
        assert guidance is not None
        self.guidance = guidance

    def enter_models(self, pipe: Any) -> None:
        """Stand in front of the denoisers that the pipeline has now."""
        for name in denoiser_names(pipe):
            self.enter(pipe, name)

    def call(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``call``, the pipeline's own ``__call__``, inside a session."""
        with self.one_call():
            self.enter_models(pipe)
            return run_stock(pipe, self, self.guidance, call, args, kwargs)


def run_stock(
    pipe: Any,
    patch: BasicState,
    guidance: StockGuidance,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The pipeline's own ``call``, whose guidance is resumed."""
    sessions = stock_sessions(pipe, patch, guidance)
    patch.running.update(sessions)
    try:
        return call(*args, **kwargs)
    finally:
        patch.running = {}
        undo_all(*[session.end for session in sessions.values()])
