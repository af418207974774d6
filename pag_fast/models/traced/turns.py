"""Which step of a call is compared again: the last one first, and then each in turn."""

from __future__ import annotations

from collections.abc import Hashable

# shares that are far apart, however many of them there are
_GOLDEN = 0.6180339887


class Turns:
    """Where in a call, from 0 to 1, the comparison behind the first one is made."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}

    def next(self, chosen: Hashable) -> float:
        """The place for a call with these layers and arguments; another one for the next call.

        What a model does at late timesteps alone, it does in the last step.
        """
        calls = self._calls.get(chosen, 0)
        self._calls[chosen] = calls + 1
        return 1.0 - calls * _GOLDEN % 1.0
