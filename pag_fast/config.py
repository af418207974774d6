"""The options of :func:`pag_fast.patch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .ops import check_backend, check_rescale_mode
from .perturbations import Branch, Perturbation, by_name
from .settings.checks import Settings, number, switch
from .settings.compile_config import CompileConfig
from .settings.layers import Layers, as_list
from .settings.mesh import check_is_mesh
from .settings.reuse import Reuse
from .settings.schedules import Schedule


def check_scale(name: str, value: Any) -> float | None:
    """``value`` as a float, of any type that :func:`pag_fast.settings.checks.number` takes.

    Raises:
        ValueError: neither ``None`` nor a finite number that is not negative.
    """
    return None if value is None else number(name, value, least=0.0)


@dataclass(frozen=True)
class PatchConfig(Settings):
    """How a pipeline is patched.

    Attributes:
        layers: attention layers to perturb, in any form :mod:`pag_fast.models.layer_names` accepts;
            ``None`` keeps those that the pipeline has.
        perturbation: what happens there to the perturbed rows: a name or an object of
            :mod:`pag_fast.perturbations`; ``"identity"`` is PAG.
        branches: several perturbed branches, each with layers, a perturbation and a scale of its
            own, instead of ``layers`` and ``perturbation``: the prediction is ``u + g·(c − u)``
            and ``s·(c − p)`` of each branch p.
        pag_scale, pag_adaptive_scale: for a pipeline that has no PAG of its own, where a call does
            not say otherwise: 3.0 and 0.0 if omitted. The PAG pipelines take both in every call.
        schedule: the PAG scale from step to step; ``None`` is the pipeline's ``pag_scale`` and
            ``pag_adaptive_scale``.
        rescale_mode: what to do against the contrast that guidance adds, in place of the pipeline's
            ``guidance_rescale``: ``"cfg"`` (all of the guidance), ``"full"``, ``"partial"`` or
            ``"snf"`` (PAG's part), see :func:`pag_fast.ops.reference.combine_guidance`.
        rescale: how much of it, 0 to 1; ``"snf"`` has none.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        share_branches: run rows that are equal once. Off, every branch runs on its own, and
            only the attention processors and the guidance combination differ from stock diffusers.
        cache_conditioning: compute what depends on nothing but the prompt, the sizes or the control
            image once per call: text keys and values, projections and embeddings.
        fewer_launches: leave out divisions by one and what diffusers asks of every attention's
            processor anew, and run layers that see the same input (queries, keys and values;
            projections of the time embedding) as one product. Their weights move next to each other
            in memory until the pipeline is unpatched.
        compile: compile the denoiser and its ControlNets until the pipeline is unpatched; ``True``,
            or a :class:`CompileConfig`.
        graphs: on a CUDA device, record the forwards of the denoiser and its ControlNets from the
            second step of a call on, and launch them again without their Python: for small batches,
            where a step waits for it. Needs no compiler. A call holds the memory that its forwards
            use, once more. Writes through ``.data`` into weights whose outputs are kept
            (``cache_conditioning``) are not noticed there.
        reuse: take ``cond − perturbed`` over from earlier steps (:class:`pag_fast.Reuse`): faster,
            and another picture than without.
        mesh: one named dimension, of 2 or 3 ranks, of a torch ``DeviceMesh``: every rank runs some
            of the branches, and all have the same picture (docs/ranks.md). Looked at by
            :func:`pag_fast.patch`, as it belongs to a process.
        exact_layers: a name such as ``"blocks.1"`` does not match ``blocks.10`` to ``blocks.19``.
        strict: raise where the default would fall back to the unshared path with a warning.
    """

    layers: Layers | None = None
    perturbation: str | Perturbation = "identity"
    branches: Sequence[Branch] | None = None
    pag_scale: float | None = None
    pag_adaptive_scale: float | None = None
    schedule: Schedule | None = None
    rescale_mode: str | None = None
    rescale: float | None = None
    backend: str = "auto"
    share_branches: bool = True
    cache_conditioning: bool = True
    fewer_launches: bool = True
    compile: bool | CompileConfig = False
    graphs: bool = False
    reuse: Reuse | None = None
    mesh: Any = None
    exact_layers: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            as_list(self.layers)
        by_name(self.perturbation)
        if self.branches is not None:
            self._check_branches(self.branches)
        if not isinstance(self.schedule, Schedule | None):
            raise ValueError(f"schedule must be a pag_fast.Schedule; got {self.schedule!r}.")
        object.__setattr__(self, "rescale", _checked_rescale(self.rescale_mode, self.rescale))
        if not isinstance(self.backend, str):
            raise ValueError(f"backend must be a name; got {self.backend!r}.")
        check_backend(self.backend)
        for name in ("pag_scale", "pag_adaptive_scale"):
            object.__setattr__(self, name, check_scale(name, getattr(self, name)))
        for name in (
            "share_branches",
            "cache_conditioning",
            "fewer_launches",
            "graphs",
            "exact_layers",
            "strict",
        ):
            switch(name, getattr(self, name))
        if not isinstance(self.compile, bool | CompileConfig):
            raise ValueError(
                f"compile must be True, False or a CompileConfig; got {self.compile!r}."
            )
        if self.graphs and self.compile:
            raise ValueError(
                "graphs=True records launches of models that are not compiled: leave out compile, "
                "or use compile=CompileConfig(cuda_graphs=True), which makes graphs of its "
                "own."
            )
        if self.reuse is not None and not isinstance(self.reuse, Reuse):
            raise ValueError(f"reuse must be a pag_fast.Reuse or None; got {self.reuse!r}.")
        if self.mesh is not None:
            check_is_mesh(self.mesh)

    @property
    def rescales_cfg(self) -> bool:
        """Whether guidance is rescaled whatever it consists of, so that of CFG alone is, too."""
        return self.rescale_mode == "cfg" and bool(self.rescale)

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
    def installed(self) -> PatchConfig:
        """What of it decides which processors, forwards and compiled models there are."""
        return replace(
            self,
            layers=None,
            pag_scale=None,
            pag_adaptive_scale=None,
            schedule=None,
            rescale_mode=None,
            rescale=None,
            reuse=None,
            mesh=None,
            graphs=False,
            strict=False,
        )

    @property
    def traces(self) -> bool:
        """Whether compiled graphs hold whole models: repeated blocks share theirs."""
        return self.compilation is not None and not self.compilation.regional


def _checked_rescale(mode: Any, rescale: Any) -> float | None:
    if mode is not None:
        if not isinstance(mode, str):
            raise ValueError(f"rescale_mode must be a name or None; got {mode!r}.")
        check_rescale_mode(mode)
    if mode in (None, "snf"):
        if rescale is not None:
            missing = "a rescale_mode" if mode is None else "another rescale_mode than 'snf'"
            raise ValueError(f'rescale={rescale!r} needs {missing}: "full", "partial" or "cfg".')
        return None
    if rescale is None:
        raise ValueError(f"rescale_mode={mode!r} needs rescale, a number from 0 to 1; got None.")
    return number(f"rescale_mode={mode!r} needs rescale, which", rescale, least=0.0, most=1.0)
