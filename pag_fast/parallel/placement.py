"""Which rank runs which branches, and what of a call's arguments it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.registry import COND, PERTURBED
from ..sharing.arguments import ALL_RESIDUALS, change_arguments, lists_by_row
from ..sharing.rows import SHARED, SPLIT, map_tensors

Slabs = tuple[int, int, int]
Span = tuple[int, int]
"""The first slab of a batch that a rank runs, and the one behind the last; equal: none."""


def spans(layout: Sequence[str], size: int) -> tuple[Span, ...]:
    """The slabs of each of ``size`` ranks, 2 or 3.

    A branch is on the same rank with perturbed rows and without. On two ranks cond and perturbed
    are together, as they share what is in front of the fork, unless they are all there is.
    """
    full, others = len(layout), list(layout).index(COND)
    if size == 2:
        ends = [others or 1, full]
    elif others:
        ends = [1, 2, full]
    else:  # all perturbed branches together, as one of them may be the copy of another
        ends = [1, full, full]
    return tuple(zip([0, *ends], ends, strict=False))


def slabs_of(decided: Slabs | None, mine: Sequence[str]) -> Slabs | None:
    """How many slabs a rank with the branches ``mine`` runs at MERGED, SHARED and SPLIT.

    ``decided`` is what one process would run for all of them. Uncond and cond are never on one
    rank with perturbed rows behind them, so nothing is merged.
    """
    full, perturbed = len(mine), list(mine).count(PERTURBED)
    if decided is None or not perturbed:
        return None
    shared = full - perturbed
    if not shared or decided[SHARED] == decided[SPLIT]:
        return full, full, full
    return shared, shared, full


def cut(call: dict[str, Any], rows: int, frames: int, full: int, span: Span) -> dict[str, Any]:
    """A model's arguments of ``full`` slabs, ``rows`` rows, with those of ``span`` alone."""
    start, stop = span[0] * rows // full, span[1] * rows // full

    def change(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] not in (rows, rows * frames):
            return x
        each = x.shape[0] // rows
        return x[start * each : stop * each]

    lists = lists_by_row(call, rows)
    changed = change_arguments(call, change, lambda x: x[start:stop], lists)
    unit = rows // full * frames
    for name in ALL_RESIDUALS:
        if changed.get(name) is not None:
            changed[name] = map_tensors(changed[name], lambda x: _residual(x, unit, span))
    return changed


def _residual(x: torch.Tensor, unit: int, span: Span) -> torch.Tensor:
    """A residual's slabs of ``span``: those that it lacks are equal to its last one."""
    have, rest = divmod(x.shape[0], unit)
    if rest or not have:
        return x
    start, stop = (min(at, have - 1) for at in (span[0], span[1] - 1))
    return x[start * unit : (stop + 1) * unit]
