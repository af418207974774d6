"""Autocast: what our ops take in place of fused attention, which is on autocast's list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

_KNOWN = ("cpu", "cuda")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The lower dtype of a running autocast region of that device; ``None`` outside of one."""
    # meta tensors, for one, know no autocast
    if device_type not in _KNOWN and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def lowered(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Queries, keys, values and masks as autocast hands them to fused attention.

    Norms return fp32 there and projections the lower dtype: autocast brings all of them to the
    lower one. It leaves fp64 and what is not floating as it is, and so does this.
    """
    dtype = None
    for x in tensors:
        if x is not None:
            dtype = autocast_dtype(x.device.type)
            break
    if dtype is None:
        return list(tensors)

    def lower(x: torch.Tensor | None) -> torch.Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if x is not None and eligible else x

    return [lower(x) for x in tensors]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A region in which what our own arithmetic says is fp32 stays fp32."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def lower_all(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As :func:`lowered`, of tensors that are all there."""
    return tuple(x for x in lowered(*tensors) if x is not None)


def region_of(tensors: Iterable[torch.Tensor | None]) -> str:
    """The type of device whose autocast region tensors are in, that of the first of them.

    Meta tensors, for one, know no autocast: the CPU's stands for theirs.
    """
    found = next((x.device.type for x in tensors if x is not None), "cpu")
    return found if torch.amp.is_autocast_available(found) else "cpu"
