"""By which weights a loop adds predictions, and what is right about that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.registry import COND, UNCOND
from .weighted_sums import TIMES, Sum, fit, most_of, rounding_of

# of a result of which more is left, weights tell nothing
_TELLS = 0.5
# shares of uncond in two steps that are guided alike
_ALIKE = 1e-2


@dataclass(frozen=True)
class Columns:
    """What a combination may be a sum of, and the products of all that.

    Attributes:
        rounds: the branches of each round, in the order of the columns.
        kinds: of the rounds.
        active: PAG's difference is in them.
        assumed: which of them is cond's was not seen.
        latents: their latents are the next column.
        old: branches of earlier steps, whose columns follow.
        result: the combination of the step before is the last column.
    """

    rounds: list[list[str]]
    kinds: Any
    active: bool
    assumed: bool
    latents: bool
    old: list[str]
    result: bool
    dtype: torch.dtype
    products: torch.Tensor

    @property
    def branches(self) -> list[str]:
        """Branches of all rounds."""
        return [branch for found in self.rounds for branch in found]


class Judge:
    """What is said of the combinations of one call.

    Args:
        name: of the pipeline's class.
        tell: is told of what may be wrong.
        refusal: makes an error of a reason.
        rescales: says whether the pipeline rescales what it combines.

    Attributes:
        seen: by which weights the loop adds predictions.
        unconfirmed: kinds of rounds whose order was assumed, and that no weights have shown yet.
    """

    def __init__(
        self,
        name: str,
        tell: Callable[[str], None],
        refusal: Callable[[str], ValueError],
        rescales: Callable[[], bool],
    ) -> None:
        self._name, self._tell, self._refusal, self._rescales = name, tell, refusal, rescales
        self.seen: dict[str, str] = {}
        self.unconfirmed: set[Any] = set()
        self._confirmed: set[Any] = set()
        self._told: set[str] = set()

    def guidance(self, columns: Columns) -> None:
        """See by which weights the loop has made the combination of the predictions."""
        found = columns.products.cpu()
        if float(found[-1, -1]) <= 0.0:
            return  # of zeros, PAG's difference has no part either
        branches, most = columns.branches, most_of(columns.dtype)
        (weights, left), total = self._apart_from_past(columns, found)
        # a loop that turns predictions of one kind into another, by its latents, weighs them anew
        beside = columns.latents and _is_better(
            self._own(columns, found, range(len(branches))),
            fit(found, range(len(branches))),
            columns.dtype,
        )
        if not columns.active:
            return
        terms = " + ".join(f"{w:.3g} · {x}" for x, w in zip(branches, weights, strict=True))
        self.seen.setdefault("guidance", terms + ("" if left <= most else f" + {left:.1%} more"))
        if len(columns.rounds) > 1:
            weights = self._of_rounds(columns, found, Sum(weights, left))
        if left <= _TELLS:
            self.order(columns, weights)
        elif columns.assumed and UNCOND in branches:
            self.unconfirmed |= {columns.kinds} - self._confirmed
        # a rescaled prediction of another kind is a sum with the latents, too
        rescaled = beside and self._rescales()
        if left > most or rescaled:
            why = (
                "it rescales them" if rescaled else f"{left:.1%} of the result are left unexplained"
            )
            self.tell_once(
                "more",
                f"{self._name} does more to the predictions than to weigh them ({why}): PAG's "
                "difference goes through that, too, and may come out weaker or stronger",
            )
        elif abs(abs(total) - 1.0) > most and not beside:
            self.tell_once(
                "sum",
                f"{self._name} adds predictions with weights that sum to {total:.3g}:"
                " PAG's difference comes out as many times as strong",
            )

    def _apart_from_past(self, columns: Columns, found: torch.Tensor) -> tuple[Sum, float]:
        """The step's own weights, and what all sum to; without what takes each other away."""
        count, width = len(columns.branches), found.shape[0] - 1
        own, every = self._own(columns, found, range(count)), fit(found, range(width))
        most = most_of(columns.dtype)
        if every.left > most or not _is_better(every, own, columns.dtype):
            return own, sum(own.weights)
        now = Sum(every.weights[:count], every.left)
        past = every.weights[count + columns.latents :]
        if abs(sum(past)) <= most:
            return now, sum(now.weights)
        if self._is_repeated(columns, found, every):
            return now, sum(now.weights) + sum(past)
        raise self._refusal(
            "and uses a prediction of an earlier step once more: PAG's difference in it is that of "
            "another step"
        )

    def _own(self, columns: Columns, found: torch.Tensor, chosen: Sequence[int]) -> Sum:
        """Weights of the ``chosen`` predictions, beside latents where the loop adds those."""
        alone = fit(found, chosen)
        if not columns.latents:
            return alone
        beside = fit(found, [*chosen, len(columns.branches)])
        if beside.left > most_of(columns.dtype) or not _is_better(beside, alone, columns.dtype):
            return alone
        return Sum(beside.weights[:-1], beside.left)

    def _is_repeated(self, columns: Columns, found: torch.Tensor, every: Sum) -> bool:
        """Whether what is used of the past is a guided prediction, as multi-step methods do."""
        count = len(columns.branches)
        if not set(columns.old) <= set(columns.branches):
            return False
        if columns.result:
            own = self._own(columns, found, [*range(count), found.shape[0] - 2])
            if not _is_better(every, own, columns.dtype):
                return True
        past = range(count + columns.latents, count + columns.latents + len(columns.old))
        again = fit(found, [*range(count), *past])
        shares = [
            sum(w for branch, w in own if branch == UNCOND) / (sum(w for _, w in own) or 1.0)
            for own in (
                list(zip(columns.branches, again.weights, strict=False)),
                list(zip(columns.old, again.weights[count:], strict=True)),
            )
        ]
        alike = abs(shares[0] - shares[1]) <= _ALIKE * max(map(abs, (*shares, 1.0)))
        return alike and not _is_better(every, again, columns.dtype)

    def _of_rounds(self, columns: Columns, found: torch.Tensor, own: Sum) -> list[float]:
        """The weights of several rounds of a step, where they can be told.

        Raises:
            ValueError: one prediction is made of forwards of which any may be cond's.
        """
        count, last = len(own.weights), len(columns.rounds[-1])
        most = most_of(columns.dtype)
        alone = self._own(columns, found, range(count - last, count))
        if alone.left <= most and not _is_better(own, alone, columns.dtype):
            return [0.0] * (count - last) + alone.weights
        whole = all({COND, UNCOND} <= set(branches) for branches in columns.rounds)
        if own.left > most or not whole:
            raise self.repeated(columns.branches)
        return own.weights

    def order(self, columns: Columns, weights: list[float]) -> None:
        """See whether cond was cond: guidance goes away from uncond, or lies between the two.

        Raises:
            ValueError: cond was taken for uncond.
        """
        most, place = most_of(columns.dtype), 0
        for branches in columns.rounds:
            own = list(zip(branches, weights[place : place + len(branches)], strict=True))
            place += len(branches)
            total = sum(w for _, w in own)
            if abs(total) <= most:
                continue
            uncond = sum(w for branch, w in own if branch == UNCOND) / total
            if uncond > 1.0 + most:
                raise self._refusal(
                    "and runs its branches in another order than diffusers' pipelines do: cond was "
                    "taken for uncond"
                )
            if uncond < -most:
                self._confirmed.add(columns.kinds)
        if columns.assumed and UNCOND in columns.branches:
            self.unconfirmed.add(columns.kinds)
        self.unconfirmed -= self._confirmed

    # ---- what is told ----

    def no_order(self) -> ValueError:
        return self._refusal(
            "and its loop shows neither by its prompts nor by what it makes of the predictions "
            "which of them is cond's"
        )

    def repeated(self, branches: list[str]) -> ValueError:
        return self._refusal(
            f"and runs its denoiser for cond {branches.count(COND)} times in a step and makes one "
            "prediction of that: which of them is cond's cannot be told"
        )

    def tell_once(self, kind: str, reason: str) -> None:
        # shares and weights differ from step to step
        if kind not in self._told:
            self._told.add(kind)
            self._tell(reason)


def _is_better(more: Sum, fewer: Sum, dtype: torch.dtype) -> bool:
    """Whether the terms that ``more`` has and ``fewer`` has not are there."""
    return fewer.left > rounding_of(dtype) and fewer.left > TIMES * more.left
