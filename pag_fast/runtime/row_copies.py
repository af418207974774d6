"""A denoiser's arguments with other rows than its loop has given: copies, made once a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..sharing.arguments import ALL_RESIDUALS, change_arguments, change_list, lists_by_row
from ..sharing.rows import change_level, map_tensors
from .access.forwards import Call

Copies = dict[int, tuple[torch.Tensor, int, torch.Tensor]]
"""Tensors, by id, with their versions and copies of them with other rows."""


def with_rows(
    call: Call,
    rows: int,
    frames: int,
    known: Copies,
    change: Callable[[Any, int, int], Any],
    have: int,
    want: int,
) -> tuple[Call, Copies]:
    """Arguments with ``change`` applied to what is batched, the same copies in every step."""
    copies: Copies = {}

    def copied(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] not in (rows, rows * frames):
            return x
        key = id(x)
        own, version, copy = known.get(key, (None, 0, x))
        # as version_of() says, without a call for every argument
        now = -1 if x.is_inference() else x._version
        if own is not x or version != now or now < 0:
            copy = change(x, have, want)
        copies[key] = x, now, copy
        return copy

    # most models take none, and every step comes by here
    if list not in map(type, call.values()):
        return change_arguments(call, copied), copies
    of_list = change_list if change is change_level else change
    lists = lists_by_row(call, rows)
    made = change_arguments(call, copied, lambda x: of_list(x, have, want), lists)
    if change is turned:  # residuals get rows where they are added, but not another order
        made |= {n: map_tensors(call[n], copied) for n in ALL_RESIDUALS if call.get(n) is not None}
    return made, copies


def turned(x: Any, have: int, want: int) -> Any:
    """``x``, a tensor or a list of rows, with its slabs in the opposite order."""
    if isinstance(x, list):
        unit = len(x) // have
        return [row for slab in reversed(range(have)) for row in x[slab * unit :][:unit]]
    return torch.cat(x.chunk(have)[::-1])
