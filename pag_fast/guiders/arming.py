"""The way from a loop's call of its denoiser to the guider that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import nn

_NAME = "_compiled_call_impl"

Run = Callable[..., Any]


class Armed:
    """Takes the place of a denoiser's call, in front of its hooks and its graph.

    ``nn.Module.__call__`` goes through this attribute, compiled or not, so that exceptions of
    everything inside are seen.

    Args:
        forward: a method of the guider, called with what runs the denoiser, ``args`` and
            ``kwargs``. A guider that is gone leaves the denoiser as it was.
    """

    def __init__(self, denoiser: nn.Module, forward: Callable[[Run, Any, Any], Any]) -> None:
        release(denoiser)
        self.denoiser = denoiser
        self._before = vars(denoiser).get(_NAME)
        self._run: Run = self._before or denoiser._call_impl
        self._forward = WeakMethod(forward)
        # a module that torch.compile has wrapped would set it on the one inside
        object.__setattr__(denoiser, _NAME, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward()
        if forward is None:
            self.disarm()
            return self._run(*args, **kwargs)
        try:
            return forward(self._run, args, kwargs)
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Put back what was there."""
        if vars(self.denoiser).get(_NAME) is not self:
            return
        if self._before is None:
            object.__delattr__(self.denoiser, _NAME)
        else:
            object.__setattr__(self.denoiser, _NAME, self._before)


def release(denoiser: nn.Module) -> None:
    """Disarm a denoiser whose pass came to no forward, as the loop of some guider raised."""
    left = vars(denoiser).get(_NAME)
    if isinstance(left, Armed):
        left.disarm()
