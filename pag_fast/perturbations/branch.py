"""A perturbed branch: where, how, and how strongly it guides."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings.checks import Settings
from ..settings.layers import Layers, as_list
from .base import Perturbation, store_number
from .blocks import ShuffledTokens, SkippedBlock
from .blur import BlurredMap, BlurredQueries
from .identity import Identity, SoftIdentity
from .noise import NoisyScores

_CLASSES: tuple[type[Perturbation], ...] = (
    Identity,
    SoftIdentity,
    BlurredQueries,
    BlurredMap,
    NoisyScores,
    ShuffledTokens,
    SkippedBlock,
)
NAMES = {cls.name: cls for cls in _CLASSES}


def by_name(perturbation: str | Perturbation) -> Perturbation:
    """The perturbation object itself, or the one of that name with its default settings.

    Raises:
        ValueError: an unknown name, or something else than a name and a perturbation.
    """
    if isinstance(perturbation, Perturbation):
        return perturbation
    if isinstance(perturbation, str) and perturbation in NAMES:
        return NAMES[perturbation]()
    raise ValueError(
        f"Unknown perturbation {perturbation!r}: choose one of {', '.join(map(repr, NAMES))}, or "
        "an object of pag_fast.perturbations such as SoftIdentity(0.5)."
    )


@dataclass(frozen=True)
class Branch(Settings):
    """One perturbed branch p of several: the guided prediction gets ``scale·(cond − p)`` added.

    Attributes:
        layers: its perturbed layers, in any form :mod:`pag_fast.models.layer_names` accepts.
        perturbation: a name or an object of :mod:`pag_fast.perturbations`.
        scale: its guidance scale; ``None`` is the call's ``pag_scale``. ``pag_adaptive_scale``
            lowers either.

    Raises:
        ValueError: empty layers, an unknown perturbation, or a negative scale.
    """

    layers: Layers
    perturbation: str | Perturbation = "identity"
    scale: float | None = None

    def __post_init__(self) -> None:
        as_list(self.layers)
        object.__setattr__(self, "perturbation", by_name(self.perturbation))
        if self.scale is not None:
            store_number(self, "scale", least=0.0)
