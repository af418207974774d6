"""A step with a forward for each branch: what the first step of a derived model has to equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models.traced.preserved import undisturbed
from ..perturbations import Identity
from ..sharing.arguments import frames_of, latents_of, lists_by_row
from ..sharing.rows import map_tensors
from ..sharing.sequence import OutOfOrder
from .access.forwards import Call, Forward
from .access.instance_patch import InstancePatch
from .installation import Installation
from .loops.predictions import prediction_of

# a share of cond − perturbed that an error of ours would be far above
_OF_DIFFERENCE = 0.05
# rounding between two sizes of batch is measured, and then several times as much
_TIMES_ROUNDING = 8.0
_LEAST_EPS, _LEAST = 4.0, 1e-5
# rows that differ by more between batches of two sizes depend on each other
_MOST_ROUNDING = {torch.float16: 3e-2, torch.bfloat16: 1e-1}

# what a model raises whose rows are not where they were looked for
FAILURES = (RuntimeError, IndexError, TypeError, KeyError, AttributeError)


def said(error: Exception) -> str:
    """The error as a part of a sentence; memory that runs out is no fault of a description."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        raise error
    if isinstance(error, OutOfOrder):
        return str(error)
    return f"{type(error).__name__}: {error}"


def difference(x: torch.Tensor, expected: torch.Tensor) -> str:
    """How far ``x`` is from a prediction of as many rows; empty if it is within rounding."""
    if x.shape != expected.shape:
        return f"{tuple(x.shape)} where {tuple(expected.shape)} was expected"
    error, limit = _distance(x, expected), _rounding_of(expected.dtype)
    if error <= limit:
        return ""
    return f"it differs by {error:.1e} of its norm, where rounding explains {limit:.1e}"


def _rounding_of(dtype: torch.dtype) -> float:
    return max(_LEAST_EPS * torch.finfo(dtype).eps, _LEAST)


@dataclass(frozen=True)
class Separately:
    """Predictions of separate forwards.

    Attributes:
        stock: of the model as it is, for cond and what comes before it.
        perturbed: of the perturbed rows alone, perturbed by dense masks.
        unit: rows of one branch.
        rounding: how far the same rows differ between batches of two sizes, by their norm.
    """

    stock: torch.Tensor
    perturbed: torch.Tensor
    unit: int
    rounding: float

    @classmethod
    def run(
        cls,
        forward: Forward,
        call: Call,
        installed: Installation,
        full: int,
        rounding: float | None = None,
    ) -> Separately:
        """Run the model for each branch of ``call``, which holds ``full`` of them.

        ``rounding`` is that of another step; ``None``: it is measured, by one more forward.
        """
        state, branches = installed.state, len(installed.branches)
        own = [
            (vars(attention), "processor", installed.processors[name])
            for name, attention in installed.attentions.items()
        ]
        first, unit = full - branches, latents_of(call).shape[0] // full
        before = state.slabs, state.entered, state.tokens

        def run(make: Callable[[], InstancePatch], part: Call) -> torch.Tensor:
            with undisturbed(installed.denoiser, part):
                return prediction_of(forward.run(make, (state,), part))

        try:
            state.slabs = None
            stock = run(InstancePatch.nothing, some(call, full, 0, first))
            if rounding is None:
                larger = run(InstancePatch.nothing, some(call, full, 0, full))
                rounding = _distance(larger[: len(stock)], stock)
            state.slabs = (branches,) * 3
            if [type(branch.perturbation) for branch in installed.branches] == [Identity]:
                state.tokens = {name: x.densely() for name, x in state.tokens.items()}
            perturbed = run(lambda: InstancePatch(own), some(call, full, first, full))
        finally:
            state.slabs, state.entered, state.tokens = before
        return cls(stock, perturbed, unit, rounding)

    def differs(self, both: torch.Tensor) -> str:
        """How far a prediction of all rows is from these; empty if it is within rounding."""
        rows = self.stock.shape[0]
        expected = rows + self.perturbed.shape[0]
        if both.shape[0] != expected:
            return f"{both.shape[0]} rows where {expected} were expected"
        cond = self.stock[-self.unit :]
        if not self.rounding <= _MOST_ROUNDING.get(cond.dtype, 1e-4):
            return f"rows differ by {self.rounding:.1e} between batches of two sizes"
        rounding = max(_TIMES_ROUNDING * self.rounding, _rounding_of(cond.dtype))
        difference = _distance(cond, self.perturbed[: self.unit])
        for name, x, y, limit in (
            ("cond", both[:rows], self.stock, rounding),
            ("perturbed", both[rows:], self.perturbed, max(rounding, _OF_DIFFERENCE * difference)),
        ):
            error = _distance(x, y)
            if not error <= limit:
                return f"{name} by {error:.1e} of its norm, where rounding explains {limit:.1e}"
        return ""


def some(call: Call, full: int, first: int, last: int) -> Call:
    """The arguments of branches ``first`` to ``last`` of ``full``."""
    rows, frames = latents_of(call).shape[0], frames_of(call)
    by_row = lists_by_row(call, rows)

    def cut(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.shape[0] not in (rows, rows * frames):
            return x
        unit = len(x) // full
        return x[first * unit : last * unit]

    parts = {name: cut(call[name]) for name in by_row}
    rest = {name: x for name, x in call.items() if name not in parts}
    # in their order, as the first may be the latents
    found = {**map_tensors(rest, cut), **parts}
    return {name: found[name] for name in call}


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """``|x − y| / |y|``, in norms."""
    return float((x.double() - y.double()).norm() / y.double().norm())
