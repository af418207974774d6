"""Graphs without a GPU: records every operation of a forward, and runs them on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pag_fast.runtime.compatibility import row_wise
from pag_fast.runtime.compiled.capture import NotCapturable, Replay

# these wait for the device
_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


@row_wise
class Tape(TorchDispatchMode):
    """The operations that run, and whether one of them waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            raise NotCapturable(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """What a CUDA graph does: the same operations on the same addresses, and no Python."""
        for func, args, kwargs, out in self.operations:
            if not func._schema.is_mutable and _is_view(out, (args, kwargs)):
                continue
            # what was made in inference mode is written there alone
            inference = any(x.is_inference() for x in _tensors(out, args, kwargs))
            with torch.inference_mode(inference), torch.no_grad():
                now = func(*args, **kwargs)
                for x, fresh in zip(_tensors(out), _tensors(now), strict=True):
                    if x.data_ptr() != fresh.data_ptr():
                        x.copy_(fresh)


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def _is_view(out: Any, given: Any) -> bool:
    """Whether what an operation returns is where it was, by memory.

    Its schema does not say: ``reshape``, which inference mode leaves whole, may make a copy.
    """
    own = {x.untyped_storage().data_ptr() for x in _tensors(given)}
    made = _tensors(out)
    return bool(made) and all(x.untyped_storage().data_ptr() in own for x in made)


class RecordingCapture:
    """Stands for :class:`pag_fast.runtime.compiled.capture.CudaCapture`."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self.tapes: list[Tape] = []

    def __call__(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        tape = Tape()
        with tape:
            out = run()
        self.tapes.append(tape)
        self.bytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return tape.replay, out

    def stream(self) -> Any:
        return None
