"""Tensors that modules hold with a row for each row of a pipeline's batch, not of ours.

FaceID-Plus has the image's own embeddings as ``clip_embeds`` on the projection. For one forward
they get the rows that the batch has there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..sharing.arguments import version_of
from ..sharing.rows import change_level
from .access.instance_patch import Entry
from .row_copies import Copies, turned

_NAME = "clip_embeds"


def held_by(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """What the image projections of a UNet hold, by name."""
    return {f"{name}.{_NAME}": x for name, _, x in _held(denoiser)}


def _held(denoiser: nn.Module) -> Iterator[tuple[str, dict[str, Any], torch.Tensor]]:
    """The name of each projection that holds a tensor, its attributes, and that."""
    projections = getattr(denoiser, "encoder_hid_proj", None)
    for name, module in () if projections is None else projections.named_modules():
        x = vars(module).get(_NAME)
        if isinstance(x, torch.Tensor) and x.ndim:
            yield name, vars(module), x


class HeldRows:
    """What stands there while a forward runs; the same tensors in every one, where they last."""

    def __init__(self) -> None:
        self._copies: Copies = {}

    def entries(
        self, denoiser: Any, unit: int, have: int, full: int, *, turn: bool, lasts: bool
    ) -> list[Entry]:
        """Of a batch that had ``have`` slabs of ``unit`` rows and has ``full``, as copies of cond.

        Args:
            turn: the pipeline has its slabs in the opposite order.
            lasts: nobody can write into them without a trace.

        Raises:
            ValueError: rows that are none of the pipeline's batch.
        """
        copies, entries = {}, []
        for _, own, x in _held(denoiser):
            if x.shape[0] == full * unit:
                continue
            version = version_of(x)
            known, before, made = self._copies.get(id(x), (None, 0, x))
            if known is not x or before != version or version < 0 or not lasts:
                made = _completed(x, unit, have, full, turn=turn)
            copies[id(x)] = x, version, made
            entries += [(own, _NAME, made)]
        self._copies = copies
        return entries


def _completed(x: torch.Tensor, unit: int, have: int, full: int, *, turn: bool) -> torch.Tensor:
    rows = x.shape[0]
    if not rows or have * unit % rows:
        raise ValueError(
            f"{_NAME} of an IP-Adapter's projection has {rows} rows, and the pipeline's batch has "
            f"{have * unit}, {full * unit} with the perturbed ones: give it a row for each row of "
            "one of the two."
        )
    x = x.repeat_interleave(have * unit // rows, dim=0)
    return change_level(turned(x, have, have) if turn and have > 1 else x, have, full)
