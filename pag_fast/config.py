"""The options of :func:`pag_fast.patch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compiling import CompileConfig
from .layers import Layers, as_list
from .ops import check_backend
from .perturbations import Branch, Perturbation, by_name


@dataclass(frozen=True)
class PatchConfig:
    """How a pipeline is patched.

    Attributes:
        layers: attention layers to perturb, in any form :mod:`pag_fast.layers` accepts;
            ``None`` keeps those that the pipeline has.
        perturbation: what happens there to the perturbed rows: a name or an object of
            :mod:`pag_fast.perturbations`; ``"identity"`` is PAG.
        branches: several perturbed branches, each with layers, a perturbation and a scale of its
            own, instead of ``layers`` and ``perturbation``: the prediction is ``u + g·(c − u)``
            and ``s·(c − p)`` of each branch p.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        share_branches: run rows that are equal once. Off, every branch runs on its own, and
            only the attention processors and the guidance combination differ from stock diffusers.
        cache_conditioning: compute what depends on nothing but the prompt, the sizes or the control
            image once per call: text keys and values, projections and embeddings.
        fewer_launches: leave out divisions by one, and run layers that see the same input (queries,
            keys and values; projections of the time embedding) as one product. Their weights move
            next to each other in memory until the pipeline is unpatched.
        compile: compile the denoiser and its ControlNets until the pipeline is unpatched; ``True``,
            or a :class:`CompileConfig`.
        exact_layers: a name such as ``"blocks.1"`` does not match ``blocks.10`` to ``blocks.19``.
        strict: raise where the default would fall back to the unshared path with a warning.
    """

    layers: Layers | None = None
    perturbation: str | Perturbation = "identity"
    branches: Sequence[Branch] | None = None
    backend: str = "auto"
    share_branches: bool = True
    cache_conditioning: bool = True
    fewer_launches: bool = True
    compile: bool | CompileConfig = False
    exact_layers: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            as_list(self.layers)
        by_name(self.perturbation)
        if self.branches is not None:
            self._check_branches(self.branches)
        check_backend(self.backend)
        for name in (
            "share_branches",
            "cache_conditioning",
            "fewer_launches",
            "exact_layers",
            "strict",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        if not isinstance(self.compile, bool | CompileConfig):
            raise ValueError(
                f"compile must be True, False or a CompileConfig; got {self.compile!r}."
            )

    def _check_branches(self, branches: Sequence[Branch]) -> None:
        if self.layers is not None or self.perturbation != "identity":
            raise ValueError(
                "branches have layers and perturbations of their own: give branches, or layers and "
                "a perturbation."
            )
        fits = not isinstance(branches, str) and isinstance(branches, Sequence) and branches
        if not fits or not all(isinstance(branch, Branch) for branch in branches):
            raise ValueError(
                "branches must be a list of pag_fast.Branch(layers, perturbation, scale); got "
                f"{branches!r}."
            )
        object.__setattr__(self, "branches", tuple(branches))

    def branches_on(self, layers: Layers) -> tuple[Branch, ...]:
        """The perturbed branches; ``layers`` are those of the one that there is by default."""
        if self.branches is not None:
            return tuple(self.branches)
        return (Branch(layers, self.perturbation),)

    @property
    def compilation(self) -> CompileConfig | None:
        """How to compile, if at all."""
        if isinstance(self.compile, bool):
            return CompileConfig() if self.compile else None
        return self.compile

    @property
    def traces(self) -> bool:
        """Whether compiled graphs hold whole models: repeated blocks share theirs."""
        return self.compilation is not None and not self.compilation.regional
