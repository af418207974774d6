"""Which rows of a batch are equal, and so run as one: compared, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import PERTURBED
from ..sharing.arguments import (
    ADAPTER,
    ALL_RESIDUALS,
    BLOCK_RESIDUALS,
    MID_RESIDUAL,
    RESIDUALS,
    are_uneven,
    knows_places,
    latents_of,
    version_of,
)
from ..sharing.layout import Residuals
from ..sharing.plan import BranchPlan
from ..sharing.row_equality import RowEquality
from ..sharing.rows import SHARED, SPLIT, BranchState, change_level, map_tensors
from .access.instance_patch import Entry
from .compatibility import Answer
from .compatibility.findings import Findings
from .held_rows import HeldRows, held_by
from .installation import Installation

if TYPE_CHECKING:
    from .patch_state import PatchState

Slabs = tuple[int, int, int]

# what an inpainting pipeline concatenates to the latents: a callback may have replaced it
_CONCATENATED = ("mask", "masked_image_latents", "mask_latents")


class RowDecision:
    """Decides, for each forward of one denoiser, how many slabs run at each level.

    Args:
        installed: the denoiser's plan and branches.
        patch: whose counters are told.
        equality: remembers what has been compared in this call.
        copies: the perturbed rows are copies that we have made ourselves: they need no comparison.
    """

    def __init__(
        self,
        installed: Installation,
        patch: PatchState,
        equality: RowEquality,
        *,
        copies: bool = False,
    ) -> None:
        self.installed = installed
        self.patch = patch
        self.equality = equality
        self.copies = copies
        self._decided: Slabs = (0, 0, 0)
        self._decided_for: tuple[str, ...] = ()
        self._concatenated: tuple[list[torch.Tensor], list[int]] = ([], [])
        self._recheck = False
        self._held = HeldRows()

    def same_objects(
        self, call: dict[str, Any], rows: int, local: dict[str, Any], context: str = ""
    ) -> bool:
        """Whether a forward has the very conditioning of the one before it, unchanged.

        Args:
            local: the locals of the pipeline's loop, with what it concatenates to the latents.
            context: tells passes apart that take turns in a step.
        """
        same = self.equality.same_objects(call, rows, context)
        tensors, versions = [], []
        for name in _CONCATENATED:
            x = local[name] if name in local else None  # noqa: SIM401
            if x is not None and isinstance(x, torch.Tensor):
                tensors += [x]
                versions += [version_of(x)]
        before, known = self._concatenated
        kept = len(tensors) == len(before) and all(map(is_, tensors, before))
        # inference tensors do not tell whether somebody has written into them
        kept = kept and versions == known and -1 not in versions
        self._concatenated = tensors, versions
        self._recheck = not kept
        if not (same and kept and self.equality.by_construction):
            self._decided_for = ()
        return same

    def slabs(
        self,
        call: dict[str, Any],
        layout: tuple[str, ...],
        frames: int,
        unit: int,
        found: Findings,
        *,
        same: bool,
    ) -> Slabs | None:
        """How many slabs run at each level; ``None`` where there is no perturbed branch."""
        if layout[-1] != PERTURBED:
            return None
        full, plan = len(layout), self.installed.plan
        added = call["added_cond_kwargs"] if "added_cond_kwargs" in call else None  # noqa: SIM401
        # whatever else makes branches run apart, residuals get the rows of what they are added to
        between = not BLOCK_RESIDUALS.isdisjoint(call) and _complete_unknown(call, full, unit, plan)
        reason = ""
        if found.unshared:
            reason = f"the branches run apart, as {found.why(Answer.UNSHARED)}"
        elif found.recheck and not self.installed.hooks_show:
            reason = "hooks run inside of a compiled model: the branches run apart"
        elif added and "image_embeds" in added and are_uneven(added["image_embeds"], full * unit):
            reason = "an IP-Adapter has several rows for each picture: the branches run apart"
        elif plan.shuffled and knows_places(call):
            reason = (
                "masks or residuals tell tokens apart by where they are: shuffled branches run "
                "apart"
            )
        elif between:
            reason = "residuals of a ControlNet go between the blocks: the branches run apart"
        if reason:
            self.patch.fall_back(reason)
        if plan.reason or reason:
            self.patch.steps["not shared"] += 1
            self._decided, self._decided_for = (full, full, full), ()
            return self._decided
        # what a module holds is no argument, and may have been written
        same &= not found.holds_rows
        if not (same and self._decided_for == layout):
            self._decided = self._decide(call, full, frames, unit, found)
            self._decided_for = layout
        self.patch.steps["shared" if self._decided[1] < full else "not shared"] += 1
        return self._decided

    def _tell_of_rows(self, found: Findings) -> None:
        self.patch.fall_back(
            f"{found.who(Answer.SEES_ROWS)} gets PAG's rows behind those of the pipeline, and does "
            "with them what it does. If it treats every row by itself, say so with "
            "pag_fast.runtime.compatibility.row_wise()."
        )

    def again(self, call: dict[str, Any], full: int, frames: int, unit: int) -> Slabs:
        """How many slabs run at each level, from arguments that somebody else has changed.

        Raises:
            ValueError: other rows than the model was called with, or residuals that were cut to
                the rows of another decision.
        """
        rows = latents_of(call).shape[0]
        if rows != full * unit:
            raise ValueError(
                f"A hook in front of the denoiser hands on {rows} rows where it was given "
                f"{full * unit}: uncond, cond and perturbed can no longer be told apart. Remove it."
            )
        if self._decided == (full, full, full):  # the ControlNet's residuals have all rows
            return self._decided
        before = self.equality, self.copies, self._recheck
        self.equality, self.copies, self._recheck = RowEquality(), False, True
        try:
            decided = self._decide(call, full, frames, unit)
        finally:
            self.equality, self.copies, self._recheck = before
        if decided != self._decided and any(call.get(x) is not None for x in ALL_RESIDUALS):
            raise ValueError(
                "A hook in front of the denoiser makes rows differ that were equal, and the "
                "ControlNet's residuals have been cut already: patch with share_branches=False."
            )
        return decided

    def held(
        self, given: dict[str, Any], call: dict[str, Any], unit: int, *, turn: bool, lasts: bool
    ) -> list[Entry]:
        """What modules hold for each row, for the rows of ``call`` that ``given`` has become.

        Raises:
            ValueError: other rows than those of either.
        """
        have, full = (latents_of(x).shape[0] // unit for x in (given, call))
        denoiser = self.installed.denoiser
        return self._held.entries(denoiser, unit, have, full, turn=turn, lasts=lasts)

    def _decide(
        self,
        call: dict[str, Any],
        full: int,
        frames: int,
        unit: int,
        found: Findings | None = None,
    ) -> Slabs:
        """Compare the rows of the branches."""
        everything = self.equality.compared(call, full * unit, frames)
        shared = full - len(self.installed.branches)
        if not self.copies:
            held = held_by(self.installed.denoiser)
            held = {name: x for name, x in held.items() if len(x) == full * unit}
            differing = self.equality.differing(
                everything | held, full, shared - 1, shared, key="cond", recheck=self._recheck
            )
            if differing:
                self.patch.fall_back(
                    f"cond and perturbed rows differ in {', '.join(differing)}: they run apart"
                )
                return full, full, full
        elif found is not None and found.sees_rows:
            self._tell_of_rows(found)
        return self._merged(everything, full, shared), shared, full

    def _merged(self, everything: dict[str, torch.Tensor], full: int, shared: int) -> int:
        """Slabs at MERGED: one, where uncond and cond differ in their text alone."""
        if not (self.installed.plan.merged and shared == 2):
            return shared
        text = self.installed.text
        others = {n: x for n, x in everything.items() if n.split(".")[-1] not in text}
        differing = self.equality.differing(others, full, 0, 1, key="uncond", recheck=self._recheck)
        return 2 if differing else 1


def align_residuals(
    call: dict[str, Any],
    full: int,
    unit: int,
    frames: int,
    state: BranchState,
    plan: BranchPlan,
) -> None:
    """Residuals of ControlNets and adapters: each with the rows of the tensor it is added to."""
    slabs, unit = state.slabs, unit * frames

    def align(residual: torch.Tensor, level: int) -> torch.Tensor:
        want = full if slabs is None else slabs[level]
        if residual.shape[0] % unit:
            return residual
        return change_level(residual, residual.shape[0] // unit, want)

    if plan.takes_adapters and RESIDUALS in call and call.get(MID_RESIDUAL) is None:
        # such a UNet takes residuals without one for its middle to be an adapter's
        residuals = call.pop(RESIDUALS)
        if call.get(ADAPTER) is None:
            call[ADAPTER] = residuals
    if call.get(RESIDUALS) is not None:
        levels = plan.residual_levels or (SPLIT,) * len(call[RESIDUALS])
        pairs = zip(call[RESIDUALS], levels, strict=False)
        call[RESIDUALS] = [align(residual, level) for residual, level in pairs]
    if call.get(MID_RESIDUAL) is not None:
        call[MID_RESIDUAL] = align(call[MID_RESIDUAL], plan.mid_level)
    for place, levels in plan.block_residuals:
        if place.argument in call and call[place.argument] is not None:
            call[place.argument] = _behind_blocks(place, levels, call, align)
    if ADAPTER in call and call[ADAPTER] is not None:
        levels = (*plan.adapter_levels, plan.mid_level, *[SPLIT] * len(call[ADAPTER]))
        pairs = zip(call[ADAPTER], levels, strict=False)
        call[ADAPTER] = [align(residual, level) for residual, level in pairs]
        if slabs is not None and slabs[SHARED] < slabs[SPLIT]:
            _add_in_front_of_skips(call[ADAPTER], state, plan)


def _behind_blocks(
    place: Residuals,
    levels: tuple[int, ...],
    call: dict[str, Any],
    align: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[torch.Tensor]:
    """What a ControlNet adds between blocks, aligned; where it is spread, one for each block.

    One residual may go behind blocks in front of the fork and behind others.
    """
    given = call[place.argument]
    chosen: Sequence[int] = range(len(given))
    if place.spread is None or not given:
        levels = levels[place.first :] + (SPLIT,) * len(given)
    else:
        chosen = place.spread(len(given), len(levels), call)
    known: dict[tuple[int, int], torch.Tensor] = {}
    for index, level in zip(chosen, levels, strict=False):
        if (index, level) not in known:
            known[index, level] = align(given[index], level)
    return [known[pair] for pair in zip(chosen, levels, strict=False)]


def _complete_unknown(call: dict[str, Any], full: int, unit: int, plan: BranchPlan) -> bool:
    """Whether something is added between blocks that the plan does not say; it gets all rows."""
    known = {place.argument for place, _ in plan.block_residuals}
    unknown = [name for name in BLOCK_RESIDUALS - known if call.get(name) is not None]
    for name in unknown:
        call[name] = map_tensors(
            call[name],
            lambda x: x if x.shape[0] % unit else change_level(x, x.shape[0] // unit, full),
        )
    return bool(unknown) and not plan.reason


def _add_in_front_of_skips(
    residuals: list[torch.Tensor], state: BranchState, plan: BranchPlan
) -> None:
    """Some down blocks get their residual from the UNet, in place, when skips may be copies."""
    for site in plan.skip_sites:
        index = int(site.name.rpartition(".")[2])
        takes_it = getattr(site.module, "has_cross_attention", False)
        if index < len(residuals) and not takes_it:
            state.added[site.name] = residuals[index]
            residuals[index] = residuals[index].new_zeros((1, 1, 1, 1))
