"""The way from a loop's call of its denoiser to the guider that runs it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread, current_thread
from typing import Any
from weakref import WeakMethod, ref

from torch import nn

from ..runtime.access.entry import Entry
from ..runtime.access.frames import calling_pipeline

Forward = Callable[[Entry, tuple[Any, ...], dict[str, Any]], Any]


class Armed:
    """A guider's claim on the next forward of a denoiser in the loop that has prepared it.

    Forwards of other threads are not its own, nor are those of a pipeline that a callback calls
    between the preparation and the forward.

    Args:
        forward: a method of the guider, called with the denoiser's entry, ``args`` and ``kwargs``.
            A guider that is gone leaves the denoiser as it was.
    """

    def __init__(self, denoiser: nn.Module, forward: Forward) -> None:
        release(denoiser)
        self._forward = WeakMethod(forward)
        # the number of a thread that has ended is given to another one
        self._thread: ref[Thread] = ref(current_thread())
        pipe = calling_pipeline()
        self._pipe = None if pipe is None else ref(pipe)
        guider: Any = getattr(forward, "__self__", None)
        self.owner = f"{type(guider).__name__} of a modular pipeline"
        # a forward that a hook starts in the middle of the prepared one is another one
        self._runs = False
        self._entry = Entry.of(denoiser)
        self._entry.add(self)

    def is_of_this_thread(self) -> bool:
        return self._thread() is current_thread()

    def is_left_over(self) -> bool:
        """Whether no forward can be its own any more."""
        return self._forward() is None or self._thread() is None

    def owns(self) -> bool:
        """Whether the forward that begins is the one that was prepared."""
        if self.is_left_over():
            self.disarm()
            return False
        if self._runs or not self.is_of_this_thread():
            return False
        return calling_pipeline() is (None if self._pipe is None else self._pipe())

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Have the guider run the forward."""
        forward = self._forward()
        assert forward is not None
        self._runs = True
        try:
            return forward(entry, args, kwargs)
        except BaseException:
            self.disarm()
            raise
        finally:
            self._runs = False

    def disarm(self) -> None:
        """Claim nothing any longer."""
        self._entry.remove(self)


def release(denoiser: nn.Module) -> None:
    """Disarm a denoiser whose pass came to no forward, as the loop of some guider raised.

    What loops of other threads have prepared stays.
    """
    found = vars(denoiser).get("_compiled_call_impl")
    for claim in tuple(getattr(found, "claims", ())):
        if isinstance(claim, Armed) and (claim.is_of_this_thread() or claim.is_left_over()):
            claim.disarm()
