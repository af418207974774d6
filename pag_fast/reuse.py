"""Steps that use the guidance of an earlier step: faster, and no longer exact.

``cond − perturbed`` changes slowly over the steps of a call. A step that takes over the one of an
earlier step runs without its perturbed rows and costs what a step without PAG costs. Reusing the
difference of two branches is known from CFG (FasterCache, arXiv 2410.19355; adaptive guidance,
arXiv 2312.12487). How far the picture moves is measured in ``docs/lossy.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import is_number


@dataclass(frozen=True)
class Reuse:
    """When a step may use an earlier step's ``cond − perturbed``. One of the two has to be given.

    Attributes:
        every: the perturbed rows run in every ``every``-th step, from the first on; 1 is exact.
        drift: they run when the latents have moved further than this from where they last ran:
            mean ``|x − x₀|`` over mean ``|x₀|``; 0 is exact. Asks the device once per step.
    """

    every: int | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if (self.every is None) == (self.drift is None):
            raise ValueError(
                "Reuse takes either every=… (a number of steps) or drift=… (a bound); got "
                f"every={self.every!r} and drift={self.drift!r}."
            )
        if self.every is not None and not (type(self.every) is int and self.every >= 1):
            raise ValueError(
                f"every must be a whole number of steps from 1 on; got {self.every!r}."
            )
        if self.drift is not None and not (is_number(self.drift) and self.drift >= 0.0):
            raise ValueError(f"drift must be a number that is not negative; got {self.drift!r}.")


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
