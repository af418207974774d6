"""Branches on ranks: what one call knows of the processes that it is drawn by.

Every rank runs the pipeline's whole loop. In a forward it runs the model on its own branches, and
gets the predictions of all: from there on, all ranks compute the same from the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..models.registry import PERTURBED, UNCOND
from ..sharing.arguments import batched, latents_of
from ..sharing.rows import BranchState
from .agreement import code, refuse
from .exchange import Exchange, checksum
from .placement import cut, slabs_of, spans

_AGREED = ("latents' size or dtype", "number of steps", "perturbed layers")
_NOTED = (
    "branches of a step",
    "guidance scales",
    "prompts or other conditioning",
    "latents or timesteps",
)
_DRAWN = ("where the call ends", "latents behind the last step", "output_type")


class Ranks:
    """The ranks of one call of one denoiser.

    Attributes:
        rank, size: this process among how many.
        branches: how many perturbed branches there are.
    """

    def __init__(self, mesh: Any) -> None:
        self.branches = 1
        self._exchange = Exchange(mesh)
        self.rank, self.size = self._exchange.rank, self._exchange.size
        self._counts: tuple[int, ...] | None = None
        self._unit = 0
        self._note = self._conditioning = torch.zeros(0, dtype=torch.int64)
        self._codes: dict[Any, torch.Tensor] = {}
        self._agreed = False
        # of ranks that did not agree, as a number on the device
        self._differing: torch.Tensor | None = None

    # ---- in front of the model ----

    def enter(
        self,
        call: dict[str, Any],
        layout: Sequence[str],
        frames: int,
        unit: int,
        state: BranchState,
        *,
        same: bool,
        settings: Sequence[Any],
        scales: Sequence[Any],
        ahead: dict[str, Any] | None = None,
    ) -> tuple[str, ...]:
        """Leave this rank's rows alone in ``call``, and its slabs in ``state``.

        Args:
            same: the conditioning is that of the forward before.
            settings: numbers and words that have to be equal on all ranks: steps, layers.
            scales: the same, of this step: what predictions are going to be combined with.
            ahead: arguments of a forward of uncond by itself, which runs now on the first rank:
                :meth:`gathered` then returns its prediction, too, in front of the others.

        Returns:
            The branches that the model is going to run on.

        Raises:
            ValueError: on all ranks, ones that do not draw the same picture.
        """
        everything = layout if ahead is None else (UNCOND, *layout)
        found = spans(everything, self.size)
        self._counts = tuple(stop - start for start, stop in found)
        self._unit = unit
        self._write_note(call, layout, frames, scales, same=same)
        if not self._agreed:
            self._agree(call, settings)
        start, stop = found[self.rank]
        if start == stop:  # every rank runs its model in every step; nobody looks at these rows
            start, stop = 0, 1
        mine = tuple(everything[start:stop])
        rows, full = latents_of(call).shape[0], len(layout)
        if ahead is None:
            call.update(cut(call, rows, frames, full, (start, stop)))
        elif start:
            call.update(cut(call, rows, frames, full, (start - 1, stop - 1)))
        else:  # uncond is alone
            call.clear()
            call.update(ahead)
        state.slabs = slabs_of(state.slabs, mine)
        return mine

    def _write_note(
        self,
        call: dict[str, Any],
        layout: Sequence[str],
        frames: int,
        scales: Sequence[Any],
        *,
        same: bool,
    ) -> None:
        latents = latents_of(call)
        device, rows = latents.device, latents.shape[0]
        if not (same and self._agreed):
            lasting = {n: x for n, x in call.items() if x is not latents and n != "timestep"}
            found = batched(lasting, rows, frames)
            self._conditioning = checksum(found.values(), device)
        of_step = [latents, *(x for x in [call.get("timestep")] if isinstance(x, torch.Tensor))]
        key = tuple(layout), tuple(scales), device
        if key not in self._codes:
            self._codes[key] = torch.tensor([code(layout), code(scales)], device=device)
        parts = self._codes[key], self._conditioning, checksum(of_step, device)
        self._note = torch.cat(parts)

    def _agree(self, call: dict[str, Any], settings: Sequence[Any]) -> None:
        """Compare what predictions could not even be exchanged without."""
        latents = latents_of(call)
        own = [code([*latents.shape, str(latents.dtype)]), *map(code, settings)]
        numbers = torch.cat([torch.tensor(own, device=latents.device), self._note])
        found = self._exchange.numbers(numbers).cpu()
        refuse((found != found[0]).any(0), (*_AGREED, *_NOTED))
        self._agreed = True

    def prompts(self, layout: Sequence[str]) -> tuple[int, int]:
        """The branches, of those without the perturbed ones, that are the source of this rank's."""
        start, stop = spans([*layout, PERTURBED], self.size)[self.rank]
        last = len(layout) - 1
        return min(start, last), max(min(stop - 1, last), min(start, last)) + 1

    # ---- behind it ----

    def gathered(self, prediction: torch.Tensor) -> torch.Tensor:
        """The predictions ``[rows of all branches, ...]`` in the order of the batch.

        Raises:
            ValueError: ranks that do not draw the same picture, where that can be told without
                waiting for a GPU; else :meth:`finish` does.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return prediction
        most = 1 + self.branches  # of any step
        whole, notes = self._exchange.slabs(prediction, counts, self._unit, most, self._note)
        differs = (notes != notes[0]).any(0)
        if self._differing is not None and self._differing.device == differs.device:
            differs |= self._differing
        self._differing = differs
        if not differs.is_cuda:
            self._look()
        return whole

    def _look(self) -> None:
        differing, self._differing = self._differing, None
        if differing is not None:
            refuse(differing.cpu(), _NOTED)

    def finish(self, drawn: Iterable[torch.Tensor], output_type: Any) -> None:
        """The call has ended, with ``drawn``: the last combination, and who changes it, come late.

        Raises:
            ValueError: on all ranks, ones that did not draw the same picture.
        """
        self._look()
        device = self._note.device
        said = torch.tensor([code(_DRAWN), code(output_type), 0], device=device)
        notes = self._exchange.last(torch.cat([said, checksum(drawn, device)])).cpu()
        ended, kind, _, latents = (notes != notes[0]).any(0)
        # where only the output is another, some loops leave the same latents
        refuse(torch.stack([ended, latents, kind & latents]), _DRAWN)
