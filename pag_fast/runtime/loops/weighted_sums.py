"""Which weighted sum of predictions a tensor of a loop is, by least squares.

What is read of the device is one small matrix: the scalar products of the predictions and of the
tensor, from which weights and what they leave follow for any choice of the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# of what is left of a combination that is no weighted sum, and of weights that do not sum to one
_MOST = {torch.float16: 3e-2, torch.bfloat16: 6e-2}
# what a rescaled sum may leave, and be told by its weights all the same
_LOOSE = 0.1
# what rounding leaves of a sum
_LEAST_EPS, _LEAST = 4.0, 3e-6
# of what elements change by: what changes by less may change by rounding alone
_STILL = 0.5
# of elements that have changed, for those to stand for all
_FEWEST = 1 / 16
# a term is there where a sum without it leaves so many times as much
TIMES = 4.0


class Sum(NamedTuple):
    """Weights, and what share of the tensor they leave."""

    weights: list[float]
    left: float


def most_of(dtype: torch.dtype) -> float:
    """What may be left of a sum in this precision."""
    return _MOST.get(dtype, 1e-3)


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding leaves of a sum in this precision."""
    return max(_LEAST_EPS * torch.finfo(dtype).eps, _LEAST)


def products(
    columns: Sequence[torch.Tensor], target: torch.Tensor, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Scalar products of all columns and, last, the target, on their device.

    Elements of the target that are as they were ``before`` are left out: a loop that is given some
    of the frames writes those over what was predicted there, and no sum explains that.
    """
    every, device = [*(cropped(x, target) for x in columns), target], columns[0].device
    stacked = torch.stack([x.to(device, torch.float64).flatten() for x in every])
    if before is not None:
        stacked = stacked * _changed(target, before).to(device).flatten()
    return stacked @ stacked.mT


def _changed(target: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Where the target is not as it was, beside its other elements; everywhere if it is nowhere."""
    change = (target.double() - before.to(target.device)).abs()
    changed = change > _STILL * change.square().mean().sqrt()
    return changed | (changed.double().mean() < _FEWEST)


def fit(found: torch.Tensor, chosen: Sequence[int]) -> Sum:
    """The target as a sum of the ``chosen`` columns, from their :func:`products` on the host."""
    own = list(chosen)
    gram, right, norm = found[own][:, own], found[own, -1], float(found[-1, -1])
    if norm <= 0.0:
        return Sum([0.0] * len(own), 1.0)
    if not found.isfinite().all():
        return Sum([float("nan")] * len(own), float("nan"))
    # terms may depend on each other: what a loop has made before is a sum of what it got then
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    solved = torch.linalg.lstsq(
        scale[:, None] * gram * scale, (scale * right)[:, None], rcond=1e-13, driver="gelsd"
    )
    weights = solved.solution[:, 0] * scale
    left = norm - 2.0 * float(weights @ right) + float(weights @ gram @ weights)
    return Sum(weights.tolist(), (max(left, 0.0) / norm) ** 0.5)


def sum_of(target: torch.Tensor, columns: Sequence[torch.Tensor]) -> Sum:
    """The target as a sum of all columns."""
    return fit(products(columns, target).cpu(), range(len(columns)))


# ---- which local is the sum ----


def combined(
    local: dict[str, Any], names: Sequence[str], given: list[torch.Tensor]
) -> tuple[str, torch.Tensor] | None:
    """What the loop has made of predictions: a sum of all of them, else what it calls so."""
    fitting = [(name, fitted(local.get(name), given[0])) for name in names]
    partly = None
    for name, found in fitting:
        if found is None:
            continue
        whole, used = _is_sum(found, given)
        if whole:
            return name, found
        partly = (name, found) if partly is None and used else partly
    if partly is not None:
        return partly
    alike = [(name, x) for name, x in list(local.items()) if _has_shape(x, given[0].shape)]
    exact = next(((name, x) for name, x in alike if _is_sum(x, given)[0]), None)
    if exact is not None:
        return exact
    return next(((name, x) for name, x in alike if _is_nearly(x, given)), None)


def _is_nearly(found: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether a tensor is a sum of all predictions but for what rescaling has added to it."""
    weights, left = sum_of(found, given)
    whole = all(abs(w) > _LOOSE for w in weights)
    return len(given) > 1 and whole and max(left, abs(abs(sum(weights)) - 1.0)) <= _LOOSE


def _is_sum(found: torch.Tensor, given: list[torch.Tensor]) -> tuple[bool, bool]:
    """Whether a tensor is a weighted sum of all predictions, and whether of any at all."""
    weights, left = sum_of(found, given)
    most, used = most_of(found.dtype), [abs(w) > 1e-3 for w in weights]
    whole = all(used) and left <= most and abs(abs(sum(weights)) - 1.0) <= most
    return whole, any(used)


def _has_shape(x: Any, shape: torch.Size) -> bool:
    return isinstance(x, torch.Tensor) and x.shape == shape and x.is_floating_point()


def fitted(found: Any, like: torch.Tensor) -> torch.Tensor | None:
    """A tensor of the loop as one of predictions like ``like``, if it can be."""
    if not isinstance(found, torch.Tensor) or not found.numel():
        return None
    if [n for n in found.shape if n > 1] == [n for n in like.shape if n > 1]:
        return found.reshape(like.shape)  # frames of a single picture are squeezed out
    # tokens of reference pictures, and channels of a variance, are left out by the loop
    fits = found.ndim == like.ndim
    fits = fits and all(have <= whole for have, whole in zip(found.shape, like.shape, strict=True))
    return found if fits else None


def cropped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` without what the loop leaves out of it."""
    return x[tuple([slice(size) for size in like.shape])]
