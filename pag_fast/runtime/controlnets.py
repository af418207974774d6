"""The ControlNets of a running pipeline: which rows they run on, and what of it is kept."""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

from ..fusion import Fusion
from ..models.registry import COND, PERTURBED, UNCOND, controlnets, uncompiled
from ..parallel.placement import cut
from ..sharing.arguments import change_rows, latents_of, tensors_of
from ..sharing.conditioning_cache import ConditioningCache, Invariant, invariants
from ..sharing.plan import BranchPlan
from ..sharing.row_equality import RowEquality
from ..sharing.rows import BranchState, change_level, map_tensors
from ..sharing.unet_plan import plan_controlnet
from .access.entry import Entry
from .access.forwards import Call, Forward
from .access.frames import calling_frame, nobody_writes
from .access.hooked_forward import forward_entries
from .access.instance_patch import InstancePatch
from .compatibility.findings import Findings
from .compiled.graphs import Graphs
from .installation import is_eager

if TYPE_CHECKING:
    from .patch_state import PatchState
    from .session import Session


class InstalledControlNets:
    """What is put on the ControlNets of one pipeline: made once, kept from call to call.

    Attributes:
        state: what they run.
    """

    def __init__(self, patch: PatchState, controlnet: Any) -> None:
        config = patch.config
        self.patch = patch
        self.state = BranchState()
        self.nets = list(controlnets(controlnet))
        self.plans = [plan_controlnet(net) for net in self.nets]
        self.invariants: list[Invariant] = []
        self._entries: list[Any] = []
        self._eager = [net for net in self.nets if is_eager(controlnet, net)]
        for net, plan in zip(self.nets, self.plans, strict=True):
            shared = plan if config.share_branches else BranchPlan()
            keeps = net in self._eager and config.cache_conditioning
            kept = invariants(net, shared, self.state) if keeps else {}
            self._entries += forward_entries(self.state, shared.hooks(self.state, without=kept))
            self._entries += [(vars(x.module), "forward", x) for x in kept.values()]
            self.invariants += kept.values()
        self._patches: dict[bool, InstancePatch] = {}
        self._used: list[Fusion] = []  # in the latest forward

    def instance_patch(self, *, fused: bool) -> InstancePatch:
        """What is put on for a forward; ``fused``: with joined weights."""
        fusions: list[Fusion] = []
        if fused and self.patch.config.fewer_launches:
            fusions = [self.patch.fusion(net, self.state) for net in self._eager]
        self._used = fusions
        for fusion in fusions:
            if fusion.refresh():
                self._patches.pop(True, None)
        fused = bool(fusions)
        found = self._patches.get(fused)
        if found is None:
            entries = [entry for fusion in fusions for entry in fusion.entries]
            found = self._patches[fused] = InstancePatch([*self._entries, *entries])
        return found

    def left(self) -> None:
        """After a forward: what is on the nets then does nothing."""
        self.state.slabs = None
        for fusion in self._used:
            fusion.forget()


class ControlNets:
    """The ControlNets of one session: they never run on the perturbed rows.

    Attributes:
        kept: what is kept from step to step, once a forward has begun.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.owner = f"{session.owner}, its ControlNet"
        self._equality = RowEquality(nobody_writes)
        self._slabs: tuple[int, int] | None = None
        self.kept: ConditioningCache | None = None
        self._graphs: Graphs | None = None
        self._frame: FrameType | None = None

    def owns(self) -> bool:
        """Whether the forward that begins is one of the running call."""
        # PAG may be off in this call: guess mode of the PAG pipelines needs us all the same
        pipe, frame = calling_frame(self.session.loop_code)
        if pipe is not self.session.pipe:
            return False
        if frame is not self._frame:
            self._frame = frame
            self._equality.by_construction = self.session.equal_by_construction()
        return True

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward without the perturbed rows, in guess mode on the cond rows alone."""
        session = self.session
        controlnet = session.pipe.controlnet
        installed = session.patch.controlnets(controlnet)
        if self.kept is None:
            self.kept = ConditioningCache(installed.state, installed.invariants)
            self._graphs = session.patch.graphs(
                controlnet, installed.state, installed.invariants, installed.nets
            )
        forward = Forward(entry, uncompiled(controlnet), args, kwargs)
        found = Findings.together([session.patch.look(net) for net in installed.nets])
        found.refuse()
        call = forward.call
        session.begin_step()
        rows = latents_of(call).shape[0]
        same = self._equality.same_objects(call, rows)
        fused = session.pag and not found.weights_apart
        try:
            call = self.rows(call, rows, installed, found)
            session.advance(self.kept, call, found, same)
            if self._graphs is None:
                out = forward.run(
                    lambda: installed.instance_patch(fused=fused), (installed.state,), call
                )
            else:
                patch = installed.instance_patch(fused=fused)
                out = self._graphs.run(forward, patch, (installed.state,), call, found)
        finally:
            installed.left()
        if session.patch.compilation is not None:
            out = session.patch.compilation.after_model(out)
        if self._slabs is None:
            return out
        # residuals for every branch, as the pipeline expects them: it keeps them for the step
        have, want = self._slabs
        return map_tensors(out, lambda x: change_level(x, have, want))

    def forget(self) -> None:
        """Free what is kept."""
        if self.kept is not None:
            self.kept.forget()
        if self._graphs is not None:
            self._graphs.forget()

    def end(self) -> None:
        """The call is over."""
        self._frame = None
        self.forget()

    def rows(self, call: Call, rows: int, installed: InstalledControlNets, found: Findings) -> Call:
        """The arguments with the rows that the ControlNet runs on."""
        session, state = self.session, installed.state
        config = session.patch.config
        if session.pag:
            layout = session.layout(rows)
        else:
            cfg = session.pipe.do_classifier_free_guidance
            layout, session.unit = ((UNCOND, COND), rows // 2) if cfg else ((COND,), rows)
        state.slabs = self._slabs = None
        if call.get("guess_mode") and UNCOND in layout:
            start = layout.index(COND) * session.unit
            stop = start + session.unit
            return map_tensors(call, lambda x: x[start:stop] if x.shape[0] == rows else x)
        if not (session.pag and config.share_branches) or found.unshared:
            return call
        full = len(layout)
        if layout[-1] == PERTURBED:
            everything = self._equality.compared(call, rows, 1)
            differing = self._equality.differing(everything, full, -2, -1, key="cond")
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
            state.slabs = (self._merged(call, installed), 2, 2)
        return call if session.ranks is None else self._own_rows(call, layout, full)

    def _own_rows(self, call: Call, layout: tuple[str, ...], full: int) -> Call:
        """On ranks, the rows that this one's branches get residuals of."""
        session = self.session
        assert session.ranks is not None
        start, stop = session.ranks.prompts(layout[:full])
        wanted = full if self._slabs is None else self._slabs[1]
        if stop - start < full:
            self._slabs = stop - start, wanted
            session.patch.controlnets(session.pipe.controlnet).state.slabs = None
            call = cut(call, full * session.unit, 1, full, (start, stop))
        return call

    def _merged(self, call: Call, installed: InstalledControlNets) -> int:
        if not any(plan.sites for plan in installed.plans):
            return 2
        everything = self._equality.compared(call, 2 * self.session.unit, 1)
        pictures = {name for name, _ in tensors_of(call) if name.startswith("controlnet_cond")}
        if not pictures or not pictures <= everything.keys():
            return 2  # one that the net itself hands to all rows
        merged = all(plan.merged for plan in installed.plans)
        alike = {
            name: x
            for name, x in everything.items()
            if (name != "encoder_hidden_states" if merged else name.startswith("controlnet_cond"))
        }
        return 2 if self._equality.differing(alike, 2, 0, 1, key="uncond") else 1


class InjectedControlNets(ControlNets):
    """In guess mode pipelines without PAG hand over the cond rows alone."""

    def rows(self, call: Call, rows: int, installed: InstalledControlNets, found: Findings) -> Call:
        if call.get("guess_mode"):
            installed.state.slabs = self._slabs = None
            return call
        self.session.arrives(call)
        return super().rows(call, rows, installed, found)
