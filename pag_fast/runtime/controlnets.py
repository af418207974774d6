"""The ControlNets of a running pipeline: which rows they run on, and what of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..models.registry import COND, PERTURBED, UNCOND, controlnets
from ..sharing.arguments import batched, change_rows
from ..sharing.conditioning_cache import Kept, invariants
from ..sharing.plan import BranchPlan, install
from ..sharing.row_equality import Premise
from ..sharing.rows import BranchState, change_level, map_tensors
from ..sharing.unet_plan import plan_controlnet
from .installation import enter_with, is_eager

if TYPE_CHECKING:
    from .session import Session


class WatchedControlNets:
    """The ControlNets of one session: they never run on the perturbed rows.

    Attributes:
        state: what they run.
        kept: what of them is computed once per call.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.state = BranchState()
        self.kept = Kept(self.state)
        self._premise = Premise()
        self._plans: list[BranchPlan] = []
        self._slabs: tuple[int, int] | None = None

    def open(self) -> list[Callable[[], None]]:
        """Watch the pipeline's ControlNets, if it has any; returns what takes everything off."""
        config, state = self.session.patch.config, self.state
        controlnet = getattr(self.session.pipe, "controlnet", None)
        if controlnet is None:
            return []
        undo = enter_with(controlnet, self.enter, self.leave)
        self._plans = [plan_controlnet(net) for net in controlnets(controlnet)]
        for net, plan in zip(controlnets(controlnet), self._plans, strict=True):
            shared = plan if config.share_branches else BranchPlan()
            keeps = is_eager(controlnet, net) and config.cache_conditioning
            kept = invariants(net, shared, state) if keeps else {}
            undo += [h.remove for h in install(shared.hooks(state, without=kept))]
            undo += self.kept.install(kept.values())
        return undo

    def enter(self, call: dict[str, Any]) -> dict[str, Any]:
        """A ControlNet runs without the perturbed rows, in guess mode on the cond rows alone."""
        self.session.begin_step()
        rows = call["sample"].shape[0]
        same = self._premise.same_objects(call, rows)
        call = self.rows(call, rows)
        self.session.advance(self.kept, call, same)
        return call

    def rows(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        session, state = self.session, self.state
        config = session.patch.config
        cfg = session.pipe.do_classifier_free_guidance
        if session.pag:
            layout = session.layout(rows)
        else:
            layout, session.unit = ((UNCOND, COND), rows // 2) if cfg else ((COND,), rows)
        state.slabs = self._slabs = None
        if call.get("guess_mode") and UNCOND in layout:
            start = layout.index(COND) * session.unit
            stop = start + session.unit
            return map_tensors(call, lambda x: x[start:stop] if x.shape[0] == rows else x)
        if not (session.pag and config.share_branches):
            return call
        full = len(layout)
        if layout[-1] == PERTURBED:
            everything = batched(call, rows, 1)
            differing = self._premise.differing(everything, full, -2, -1, key="cond")
            if differing:
                session.patch.fall_back(
                    f"cond and perturbed rows of the ControlNet differ in {', '.join(differing)}: "
                    "it runs on both"
                )
                return call
            call = change_rows(call, rows, 1, full, full - 1)
            self._slabs = full - 1, full
            full -= 1
        if full == 2:
            state.slabs = (self._merged(call), 2, 2)
        return call

    def leave(self, out: Any) -> Any:
        """Residuals for every branch, as the pipeline expects them: it keeps them for the step."""
        if self._slabs is None:
            return out
        have, want = self._slabs
        return map_tensors(out, lambda x: change_level(x, have, want))

    def _merged(self, call: dict[str, Any]) -> int:
        everything = batched(call, 2 * self.session.unit, 1)
        merged = all(plan.merged for plan in self._plans)
        alike = {
            name: x
            for name, x in everything.items()
            if (name != "encoder_hidden_states" if merged else name.startswith("controlnet_cond"))
        }
        return 2 if self._premise.differing(alike, 2, 0, 1, key="uncond") else 1
