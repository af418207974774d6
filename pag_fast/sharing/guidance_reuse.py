"""The guidance of an earlier step, kept for the steps that take it over."""

from __future__ import annotations

import torch

from ..settings.reuse import Reuse


class Difference:
    """``cond − perturbed`` of the step in which the perturbed rows last ran, for each picture.

    Every picture of a batch is judged by itself: what another one needs does not change it.
    """

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse
        # every step runs its perturbed rows: none can use another one's difference
        self.is_off = reuse.every == 1
        self._shape: torch.Size | None = None
        self._held: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None
        self._near: torch.Tensor | None = None
        self._age = 0

    def drop(self) -> None:
        """Hold nothing: what follows is no later step of what is held."""
        self._held = self._latents = self._near = self._shape = None

    def turn_off(self) -> None:
        """Hold nothing in the rest of the loop."""
        self.is_off = True
        self.drop()

    def serves(self, latents: torch.Tensor) -> bool:
        """Whether what is held is good for the step that begins with ``latents`` ``[B, ...]``.

        If not, the perturbed rows are to run, and :meth:`perturbed` gets what they predict.
        """
        if self.is_off:
            return False
        self._age += 1
        if self._shape != latents.shape:
            # a callback has left other pictures in the batch, or resized them
            self.drop()
            self._shape = latents.shape
        if self.reuse.every is not None:
            if self._held is not None and self._age < self.reuse.every:
                return True
            self._age = 0
            return False
        self._near = self._is_near(latents)
        if self._near is not None and bool(self._near.all()):
            return True
        if self.reuse.drift:
            # some schedulers write into the latents
            kept = latents.clone()
            if self._near is not None and self._latents is not None:
                kept = torch.where(_rows(self._near, kept), self._latents, kept)
            self._latents = kept
        return False

    def _is_near(self, latents: torch.Tensor) -> torch.Tensor | None:
        """For each picture, whether its latents are near those that it was last perturbed at."""
        before, bound = self._latents, self.reuse.drift
        if self._held is None or before is None or bound is None:
            return None
        moved = (latents - before).abs().flatten(1).mean(1)
        return moved <= bound * before.abs().flatten(1).mean(1)

    def perturbed(self, cond: torch.Tensor, ran: torch.Tensor | None) -> torch.Tensor:
        """What the perturbed rows predict, or would have predicted by what is held.

        Args:
            cond: the prediction of cond, ``[B, ...]``.
            ran: that of the perturbed rows, where they have run.
        """
        if ran is None:
            assert self._held is not None
            return cond - self._held
        if self.is_off:
            return ran
        difference = cond - ran
        if self._near is not None and self._held is not None:
            near = _rows(self._near, cond)
            difference = torch.where(near, self._held, difference)
            ran = torch.where(near, cond - self._held, ran)
        self._held = difference
        return ran


def _rows(near: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return near.view(-1, *[1] * (like.ndim - 1))
