"""The guidance of an earlier step, kept for the steps that take it over."""

from __future__ import annotations

import torch

from ..settings.reuse import Reuse


class Difference:
    """``cond − perturbed`` of the step in which the perturbed rows last ran."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse
        self._held: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None
        self._age = 0

    def serves(self, latents: torch.Tensor) -> bool:
        """Whether what is held is good for the step that begins with ``latents``.

        If not, the perturbed rows are to run, and :meth:`hold` to be called.
        """
        self._age += 1
        if self._held is not None and self._is_near(latents):
            return True
        self._age = 0
        # some schedulers write into the latents
        self._latents = latents.clone() if self.reuse.drift else None
        return False

    def _is_near(self, latents: torch.Tensor) -> bool:
        if self.reuse.every is not None:
            return self._age < self.reuse.every
        before, bound = self._latents, self.reuse.drift
        if before is None or bound is None or before.shape != latents.shape:
            return False
        return bool((latents - before).abs().mean() <= bound * before.abs().mean())

    def hold(self, cond: torch.Tensor, perturbed: torch.Tensor) -> None:
        """Keep the difference of predictions ``[B, ...]``."""
        self._held = cond - perturbed

    def perturbed(self, cond: torch.Tensor) -> torch.Tensor:
        """What the perturbed rows would have predicted, by what is held."""
        assert self._held is not None
        return cond - self._held
