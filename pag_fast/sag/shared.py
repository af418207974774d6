"""What both UNet passes of a step have in common, computed by the first of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..sharing.conditioning_cache import ConditioningCache, Invariant, invariant_modules
from ..sharing.plan import has_diffusers_hooks
from ..sharing.rows import BranchState
from ..sharing.weight_signature import WeightSignature

_TIME = ("time_proj", "time_embedding")


class PassState(BranchState):
    """As :class:`BranchState`, and ``rows``: those that the running pass has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0


class LeadingRows(Invariant):
    """An :class:`Invariant` whose kept output serves fewer rows too: the first ones of it.

    Uncond comes first in the batch ``[uncond | cond]``, so what the degraded pass needs are the
    first rows of what the guided pass has computed.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.state.rows  # type: ignore[attr-defined]
        kept = self.kept.get(self.state.context)
        if kept is not None and _rows(kept.value) < rows:
            self.forget()
        out = super().run(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return _first(out, rows)
        return [_first(x, rows) for x in out] if type(out) is list else out


def _rows(value: Any) -> int:
    tensors = value if isinstance(value, list) else [value]
    return min(x.shape[0] for x in tensors)


def _first(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x if x.shape[0] <= rows else x[:rows]


class SharedPasses:
    """The replaced forwards of one UNet, and when what they keep is good.

    Text keys and values last as long as the conditioning, the embedding of the timestep lasts one
    step; the degraded pass takes the first rows of both.

    Args:
        model: the UNet, in eager mode.
        step: of the projections of the time embedding, fused once for both passes of a step.
        keeps: off, every pass computes everything.
    """

    def __init__(self, model: nn.Module, step: BranchState, *, keeps: bool) -> None:
        self.text, self.time = PassState(), PassState()
        self.step = step
        # what is checked takes turns from call to call, and only this state lasts
        self.text.checked = step.checked
        self._invariants: list[Invariant] = []
        self._times: list[Invariant] = []
        if keeps:
            found = invariant_modules(model)
            weights = WeightSignature(found.values())
            self._invariants = [
                LeadingRows(self.text, module, weights=weights) for module in found.values()
            ]
            self._times = [
                LeadingRows(self.time, module)
                for name in _TIME
                if (module := getattr(model, name, None)) is not None
                and not has_diffusers_hooks(module)
            ]
        self.kept = ConditioningCache(self.text, self._invariants)
        self.timed = ConditioningCache(self.time, self._times)
        self._spoiled = False
        self._timestep: Any = None

    @property
    def states(self) -> tuple[BranchState, ...]:
        """What the replaced forwards read."""
        return self.text, self.time, self.step

    @property
    def entries(self) -> list[tuple[dict[str, Any], str, Any]]:
        """The replaced forwards, ready for an instance patch."""
        return [(vars(x.module), "forward", x) for x in (*self._invariants, *self._times)]

    def guided(self, latents: torch.Tensor, timestep: Any, *, same: bool) -> None:
        """The guided pass of a step begins; ``same``: with the conditioning of the one before."""
        self.text.rows = self.time.rows = latents.shape[0]
        self.kept.advance(latents, same=same and not self._spoiled)
        self._spoiled = False
        self.step.step += 1
        self.time.step += 1
        self.time.epoch += 1
        self._timestep = timestep

    def degraded(self, latents: torch.Tensor, timestep: Any, *, leads: bool) -> None:
        """The degraded pass begins; ``leads``: its conditioning is the guided pass's first rows."""
        self.text.rows = self.time.rows = latents.shape[0]
        self.text.step += 1
        self.time.step += 1
        if not leads:
            self.text.epoch += 1
            self._spoiled = True
        if not leads or timestep is not self._timestep:
            self.time.epoch += 1
            self.step.step += 1

    def forget(self) -> None:
        """Free everything that is kept."""
        self.step.checked = self.text.checked
        self.kept.forget()
        self.timed.forget()
