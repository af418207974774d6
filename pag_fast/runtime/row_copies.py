"""A denoiser's arguments with other rows than its loop has given: copies, made once a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..sharing.arguments import change_arguments
from .forwards import Call

Copies = dict[int, tuple[torch.Tensor, int, torch.Tensor]]
"""Tensors, by id, with their versions and copies of them with other rows."""


def with_rows(
    call: Call,
    rows: int,
    frames: int,
    known: Copies,
    change: Callable[[torch.Tensor, int, int], torch.Tensor],
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

    unit = rows // have
    lists = {
        name: value[-unit:] if want < have else value + value[-unit:] * (want - have)
        for name, value in call.items()
        if is_by_row(value, rows)
    }
    return {**change_arguments(call, copied), **lists}, copies


def is_by_row(value: Any, rows: int) -> bool:
    """Whether an argument is a list with something for each row: sizes, lengths, single pictures.

    Not one of tensors of all rows, as residuals are.
    """
    if not isinstance(value, list) or len(value) != rows:
        return False
    return not any(isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == rows for x in value)


def turned(x: torch.Tensor, have: int, want: int) -> torch.Tensor:
    """``x`` with its slabs in the opposite order."""
    return torch.cat(x.chunk(have)[::-1])
