"""A clock for what the GPU does, without what the CPU takes to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

CYCLES = 2e9  # a second, at most: a slower GPU sleeps longer
LONGEST = 0.02
CACHE = 2**28  # bytes, more than any L2 cache has


class QueuedClock:
    """Seconds of one call between two events on the GPU, its L2 cache cleared before.

    The GPU sleeps until the CPU has queued the whole call. If it has not slept long enough the call
    is timed again behind a longer sleep. A call that waits for the GPU itself can never be queued:
    behind a sleep of ``LONGEST`` seconds it is taken as it is.
    """

    def __init__(self, sleep: float = 2e-4) -> None:
        self.sleep = sleep
        self._cache = torch.empty(CACHE, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], device: str = "cuda") -> float:
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self._cache.zero_()
            torch.cuda._sleep(int(self.sleep * CYCLES))
            begin.record()
            call()
            end.record()
            queued = not begin.query()
            torch.cuda.synchronize()
            if queued or self.sleep >= LONGEST:
                return begin.elapsed_time(end) / 1e3
            self.sleep = min(2 * self.sleep, LONGEST)
