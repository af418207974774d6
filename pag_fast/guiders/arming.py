"""The way from a loop's call of its denoiser to the guider that runs it."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any
from weakref import WeakMethod

from torch import nn

from ..runtime.entry import Entry
from ..runtime.instance_patch import InstancePatch

Run = Callable[..., Any]


class Armed:
    """A guider's claim on the next forward of a denoiser in the thread that has prepared it.

    Args:
        forward: a method of the guider, called with what runs the denoiser, ``args`` and
            ``kwargs``. A guider that is gone leaves the denoiser as it was.
    """

    def __init__(self, denoiser: nn.Module, forward: Callable[[Run, Any, Any], Any]) -> None:
        release(denoiser)
        self._forward = WeakMethod(forward)
        self._thread = get_ident()
        guider: Any = getattr(forward, "__self__", None)
        self.owner = f"{type(guider).__name__} of a modular pipeline"
        self._entry = Entry.of(denoiser)
        self._entry.add(self)

    def owns(self) -> bool:
        """Whether the forward that begins is the one that was prepared."""
        if self._forward() is None:
            self.disarm()
            return False
        return self._thread == get_ident()

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward, while nobody else runs the denoiser."""
        forward = self._forward()
        assert forward is not None
        try:
            with entry.lease.hold(self.owner, InstancePatch.nothing):
                return forward(entry.below, args, kwargs)
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Claim nothing any longer."""
        self._entry.remove(self)


def release(denoiser: nn.Module) -> None:
    """Disarm a denoiser whose pass came to no forward, as the loop of some guider raised."""
    found = vars(denoiser).get("_compiled_call_impl")
    for claim in tuple(getattr(found, "claims", ())):
        if isinstance(claim, Armed):
            claim.disarm()
