"""Recording what a forward launches, to launch it again without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

Replay = Callable[[], object]
"""Launches everything again, on the same memory; the outputs are where they were."""


class NotCapturable(Exception):
    """A forward does something that no recording can hold; it has to run as it is."""


class Capture(Protocol):
    """Records forwards on one device.

    Attributes:
        bytes: of memory that recordings hold on to.
    """

    bytes: int

    def __call__(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        """What ``run`` launches, and where its outputs will be once that has been launched.

        Raises:
            NotCapturable: ``run`` waits for the device, or there is no memory left.
        """

    def stream(self) -> Any:
        """What launches are ordered by: recordings made in one are not for another."""


class CudaCapture:
    """CUDA graphs: one pool of memory for all of them, on a stream of their own.

    ``torch.cuda.graph`` collects garbage and empties the cache of the allocator, which takes longer
    than a forward; a call makes its graphs anew, so they are captured without.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # out of memory is one, too
            first = str(error).strip().split("\n", 1)[0]
            raise NotCapturable(first) from error
        finally:
            current.wait_stream(self._stream)
        self.bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph.replay, out

    def stream(self) -> Any:
        return torch.cuda.current_stream(self._device)


def capture_on(device: torch.device) -> Capture:
    """What records forwards on a device.

    Raises:
        ValueError: nothing does.
    """
    if device.type != "cuda":
        raise ValueError(
            f"graphs=True records what is launched on a CUDA device, and this pipeline runs on "
            f"{device}: patch it without graphs, or move it to a GPU."
        )
    return CudaCapture(device)
