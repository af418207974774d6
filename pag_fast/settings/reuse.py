"""Steps that use the guidance of an earlier step: faster, and no longer exact.

``cond − perturbed`` changes slowly over the steps of a call. A step that takes over the one of an
earlier step runs without its perturbed rows and costs what a step without PAG costs. Reusing the
difference of two branches is known from CFG (FasterCache, arXiv 2410.19355; adaptive guidance,
arXiv 2312.12487). How far the picture moves is measured in ``docs/lossy.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import Settings, number, whole_number


@dataclass(frozen=True)
class Reuse(Settings):
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
        if self.every is not None:
            every = whole_number("every, the steps from one run to the next,", self.every, least=1)
            object.__setattr__(self, "every", every)
        if self.drift is not None:
            object.__setattr__(self, "drift", number("drift", self.drift, least=0.0))
