"""What ranks hand each other: predictions, and numbers by which they know that they agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_NUMBER = torch.int64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One int64 ``[1]`` of the bits of all tensors, in their order; equal bits, equal numbers."""
    total = torch.zeros(1, dtype=_NUMBER, device=device)
    for x in tensors:
        x = torch.view_as_real(x) if x.is_complex() else x
        bits = x.detach().to(device).contiguous().flatten().view(_INTEGERS[x.element_size()])
        places = torch.arange(1, 2 * bits.numel(), 2, dtype=_NUMBER, device=device)
        total = total * 31 + (bits.to(_NUMBER) * places).sum()  # wraps around
    return total


class Exchange:
    """The collectives of one group of ranks.

    Attributes:
        rank, size: this process among how many.
    """

    def __init__(self, mesh: Any) -> None:
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self._group = mesh.get_group()
        # of the latest slabs: bytes in front of the notes
        self._end = 0

    def _all(self, mine: torch.Tensor) -> torch.Tensor:
        """``[n]`` of every rank as ``[ranks, n]``."""
        found = mine.new_empty((self.size, mine.numel()))
        dist.all_gather(list(found.unbind(0)), mine, group=self._group)
        return found

    def numbers(self, mine: torch.Tensor) -> torch.Tensor:
        """int64 ``[n]`` of every rank as ``[ranks, n]``; n has to be the same everywhere."""
        return self._all(mine)

    def slabs(
        self, mine: torch.Tensor, counts: Sequence[int], unit: int, most: int, note: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The slabs of all ranks in order, and their notes, in one collective.

        Args:
            mine: this rank's, ``[counts[rank]·unit, ...]``; more rows are left out.
            counts: slabs of each rank, at most ``most``: every rank sends so many bytes.
            note: int64 ``[n]``.

        Returns:
            ``[Σcounts·unit, ...]``, contiguous, and ``[ranks, n]``.
        """
        shape, dtype = mine.shape[1:], mine.dtype
        each = unit * shape.numel() * mine.element_size()
        self._end = end = -(-most * each // 8) * 8  # numbers begin on eight bytes
        sent = torch.empty(end + 8 * note.numel(), dtype=torch.uint8, device=mine.device)
        own = counts[self.rank] * unit
        sent[: own * each // unit] = mine[:own].contiguous().flatten().view(torch.uint8)
        sent[end:] = note.view(torch.uint8)
        got = self._all(sent)
        parts = [
            row[: count * each].view(dtype).view(count * unit, *shape)
            for row, count in zip(got, counts, strict=True)
        ]
        return torch.cat(parts), got[:, end:].contiguous().view(_NUMBER)

    def last(self, note: torch.Tensor) -> torch.Tensor:
        """The notes of all ranks, ``[ranks, n]``, without slabs.

        As long as the latest slabs, so that it meets those of a rank that has not ended yet.
        """
        sent = note.new_zeros(self._end // 8 + note.numel())
        sent[self._end // 8 :] = note
        got = self._all(sent.view(torch.uint8))
        return got[:, self._end :].contiguous().view(_NUMBER)
