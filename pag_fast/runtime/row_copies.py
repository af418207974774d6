"""A denoiser's arguments with other rows than its loop has given: copies, made once a call."""

from __future__ import annotations

from collections.abc import Callable

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

    call = change_arguments(call, copied)
    if "img_shapes" in call:
        # of each picture a list, with those that are edited
        shapes = call["img_shapes"]
        if isinstance(shapes, list) and len(shapes) == rows and isinstance(shapes[0], list):
            call["img_shapes"] = shapes + shapes[-(rows // have) :] * (want - have)
    return call, copies


def turned(x: torch.Tensor, have: int, want: int) -> torch.Tensor:
    """``x`` with its slabs in the opposite order."""
    return torch.cat(x.chunk(have)[::-1])
