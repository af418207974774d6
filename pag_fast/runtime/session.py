"""One call of a patched pipeline: what each forward of its denoiser runs on, from entry to result.

A forward that belongs to the call goes through five steps: *enter* (its arguments by name),
*decide* (which branches, which of their rows are equal), *run* (with everything of ours on the
model, and nobody else in it), *combine* (the guidance), *leave* (what the pipeline gets). Between
forwards the model is as diffusers made it.
"""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import COND, PERTURBED, UNCOND, denoiser_name, uncompiled
from ..parallel.ranks import Ranks
from ..sharing.arguments import change_rows, frames_of, latents_of, mend_rows
from ..sharing.conditioning_cache import ConditioningCache
from ..sharing.row_equality import RowEquality
from ..sharing.rows import SPLIT
from .access.behind_hooks import entries_behind
from .access.entry import Entry as ModelEntry
from .access.forwards import Call, Forward, Views
from .access.frames import ANYWHERE, LoopCode, calling_frame, nobody_writes
from .access.instance_patch import Entry, InstancePatch
from .batch import rows_of_a_branch
from .compatibility.findings import Findings
from .compiled.graphs import Graphs
from .controlnets import ControlNets
from .guidance import steps_of_call
from .installation import is_eager
from .ranks.parallelism import share
from .row_decision import RowDecision, align_residuals
from .stock_passes import OnTop, StockPasses
from .undoing import undo_after_error, undo_all
from .warming import Warming

if TYPE_CHECKING:
    from .patch_state import PatchState


class Session(Warming):
    """The state of one running call, for one denoiser of a pipeline that has PAG.

    Attributes:
        freed: the pipeline has offloaded its models at the end of the call.
        pag: the pipeline denoises with PAG: forwards of its denoiser are ours.
        running_forward: a forward of ours is running.
        loop_code: tells the frames of its denoising loop.
        ranks: the processes that share the rows, if there are several.
    """

    _kept: ConditioningCache
    _cond_first = False
    loop_code = ANYWHERE
    ranks: Ranks | None = None
    # what goes on behind everything else for the forward that begins, and whose it is
    _above: tuple[InstancePatch, StockPasses] | None = None

    def __init__(self, pipe: Any, patch: PatchState, denoiser: str | None = None) -> None:
        super().__init__(pipe, patch)
        self.denoiser = denoiser or denoiser_name(pipe)
        self.owner = f"{type(pipe).__name__} (patched)"
        self.freed = False
        self.pag = False
        self.cfg = False
        self.running_forward = False
        self.controlnets = ControlNets(self)
        self._graphs: Graphs | None = None
        self._pass = ""
        self._frame: FrameType | None = None
        self._views: Views = {}

    # ---- the life of the call ----

    def begin(self, layers: Any, cfg: bool) -> None:
        """The pipeline is about to denoise with PAG: from here on its denoiser is entered by us.

        Raises:
            ValueError: a layer that does not exist, something on the model that leaves no right
                answer, rescale asked for twice, or code that would be passed over.
        """
        self.code = self._own_code()
        self.refuse_two_rescales()
        self.install(layers)
        self.loop_code = self._running_loop()
        self.pag, self.cfg, self.unit, self.forwards = True, cfg, 0, 0
        self._scales.clear()
        self.begin_guidance()
        self._tell_unshared()

    def install(self, layers: Any) -> None:
        """Take the plan of the model as it is now, and keep nothing that was computed by another.

        Raises:
            ValueError: as :meth:`begin`, but for rescale.
        """
        denoiser = getattr(self.pipe, self.denoiser)
        model = uncompiled(denoiser)
        # a pipeline without PAG turns gradients off behind this: each forward is looked at again
        with self.patch.alone(self.denoiser, self.owner), torch.no_grad():
            self.patch.look(model).refuse()
            self.installed = self.patch.installation(model, layers, eager=is_eager(denoiser, model))
        state, kept = self.installed.state, self.installed.invariants.values()
        self._kept, equality = ConditioningCache(state, kept), RowEquality(nobody_writes)
        self._rows = RowDecision(self.installed, self.patch, equality, copies=self._adds_rows)
        self._graphs = self.patch.graphs(denoiser, state, kept, [model])

    def _running_loop(self) -> LoopCode:
        """The loop that has turned PAG on; a subclass may run its denoiser beside it."""
        pipe, frame = calling_frame()
        return LoopCode(frame.f_code) if frame is not None and pipe is self.pipe else ANYWHERE

    def _tell_unshared(self) -> None:
        if self.installed.plan.reason and self.patch.config.share_branches:
            self.patch.fall_back(f"branches are not shared: {self.installed.plan.reason}")

    def end(self, *, whole: bool) -> None:
        """The call is over; ``whole``: the pipeline has returned its result by itself.

        Raises:
            ValueError: with ``strict=True``, a call in which PAG has not done what it should.
        """
        self._locals, self._views, self._frame = {}, {}, None
        ours = [self._kept.forget, self.installed.forget] if self.pag else []
        undo_all(self.controlnets.end, *ours)
        self._graphs = None
        if whole:
            self.check_combined()
            self.patch.tell_of_changes(self.controlnets.kept, self._kept if self.pag else None)
        # a picture of strength 0 has no steps
        none = steps_of_call(self.pipe) == 0
        none = none or getattr(self.pipe, "_interrupt", False)
        if self.pag and whole and not self.steps and not none:
            self.patch.fall_back(
                f"no forward of the {self.denoiser} was seen in this call: something else runs the "
                "model, and PAG had no effect"
            )

    @property
    def steps(self) -> int:
        """How many steps of the call have begun, as far as they came through here."""
        return self.forwards

    # ---- a forward ----

    def owns(self) -> bool:
        """Whether the forward that begins is one of this call's denoising loop."""
        # what a hook in the middle of our forward runs is nobody's
        if not self.pag or self.running_forward:
            return False
        pipe, frame = calling_frame(self.loop_code)
        if frame is None or pipe is not self.pipe:
            return False
        self._locals = frame.f_locals
        if frame is not self._frame:
            self._frame = frame
            self.begin_loop()
        return True

    def begin_loop(self) -> None:
        """Another loop than before: a subclass may run several in a call."""
        self._kept.somebody_writes = not nobody_writes()
        self._rows.equality.by_construction = self.equal_by_construction()

    def forward(self, entry: ModelEntry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the denoiser, from its arguments to what the pipeline gets."""
        forward = Forward(entry, self.installed.denoiser, args, kwargs)
        if self.installed.rows_second:
            forward.turn(self.installed.rows_second, self._views)
        found = self.patch.look(self.installed.denoiser)
        if found.refuses:
            found.refuse()
        if found.stock_pag:
            self.installed.check_others()
        self.forwards += 1
        self.running_forward = True
        try:
            call = self.enter_denoiser(forward, found)
            out = self._combined(self._run(forward, call, found))
        except BaseException as error:
            undo_after_error(self._left)
            if isinstance(error, Exception):
                self.blame(error, found)
            raise
        self._left()
        return out

    def _left(self) -> None:
        """The forward is over, one way or another."""
        self.running_forward = False
        self._locals = {}
        self._above = None
        self.installed.left()

    def _run(self, forward: Forward, call: Call, found: Findings) -> Any:
        """The model on ``call``; the perturbed layers it comes through are counted."""
        installed = self.installed
        fused = not found.weights_apart
        perturbs = installed.state.slabs is not None
        installed.state.entered = 0
        if found.parallel:
            share(installed.state, installed.denoiser, installed.attentions, call, found)

        behind = self._behind(call, found) if perturbs else []
        if perturbs and found.holds_rows:
            lasts, turn = not self._kept.somebody_writes, self._cond_first
            behind += self._rows.held(forward.call, call, self.unit, turn=turn, lasts=lasts)

        def make() -> InstancePatch:
            patch = installed.patch(fused=fused)
            return InstancePatch([*patch.entries, *behind]) if behind else patch

        if self._above is not None:
            above, passes = self._above
            out = passes.run(forward, lambda: OnTop(make(), above), installed.states, call)
        elif self._graphs is None:
            out = forward.run(make, installed.states, call)
        else:
            out = self._graphs.run(forward, make(), installed.states, call, found)
        if self.patch.compilation is not None:
            out = self.patch.compilation.after_model(out)
        if perturbs:  # a PAG pipeline may have begun in another thread meanwhile
            installed.check_others()
        missing = len(installed.attentions) - installed.state.entered
        if perturbs and missing > 0 and installed.counts and not found.may_skip:
            self.patch.fall_back(
                f"{missing} of {len(installed.attentions)} perturbed layers did not run: "
                "the model's own code, or something else on it, passes them over"
            )
        return out

    def _behind(self, call: Call, found: Findings) -> list[Entry]:
        """What compares rows again behind hooks of others in front of the denoiser."""
        if not found.recheck or not self.installed.hooks_show:
            return []
        state, frames = self.installed.state, frames_of(call)
        assert self.ran is not None and state.slabs is not None
        full = state.slabs[SPLIT]

        def again(arrived: Call) -> None:
            state.slabs = self._rows.again(arrived, full, frames, self.unit)

        return entries_behind(state, self.installed.denoiser, call, again)

    def enter_denoiser(self, forward: Forward, found: Findings) -> Call:
        """Decide what this forward runs on, and give its arguments those rows."""
        call = forward.call
        if getattr(self.pipe, "controlnet", None) is None:
            self.begin_step()
        sample = latents_of(call)
        rows, frames = sample.shape[0], frames_of(call)
        layout = self.layout(rows)
        same = self._rows.same_objects(call, rows, self._locals)
        mend_rows(call, rows)
        if layout == (COND,):
            # a callback left only the cond rows: the perturbed branch starts as their copy
            call = change_rows(call, rows, frames, 1, 2)
            layout, rows = (COND, PERTURBED), 2 * rows
        scales, branches = self._scales_at(call["timestep"]), len(self.installed.branches)
        if layout[-1] == PERTURBED and branches > 1:
            # the pipeline's batch has rows for one perturbed branch: the others begin as its copies
            full = len(layout)
            call = change_rows(call, rows, frames, full, full + branches - 1)
            layout += (PERTURBED,) * (branches - 1)
            rows = latents_of(call).shape[0]
        drops = layout[-1] == PERTURBED and self._drops(scales, call, sample, found)
        if self.patch.compilation is not None and layout[-1] == PERTURBED:
            self._warm(forward, call, layout, frames, found, dropped=drops)
        if drops:
            call = change_rows(call, rows, frames, len(layout), len(layout) - branches)
            layout = layout[:-branches]
        self._prepare(call, layout, frames, found, same=same, step=self.forwards - 1)
        self.ran = layout, scales
        return call

    def arrives(self, call: Call) -> None:
        """A ControlNet is called, whose rows are those of the denoiser behind it."""

    def layout(self, rows: int) -> tuple[str, ...]:
        """Which branches a batch of ``rows`` rows holds."""
        latents = self._locals["latents"] if "latents" in self._locals else None  # noqa: SIM401
        pictures = latents.shape[0] if type(latents) is torch.Tensor else 0
        self.unit = rows_of_a_branch(rows, self.unit, pictures, 3 if self.cfg else 2)
        slabs, rest = rows // self.unit, rows % self.unit
        if not rest and slabs == 3:
            return UNCOND, COND, PERTURBED
        if not rest and slabs == 2:
            cfg = self.cfg and getattr(self.pipe, "do_classifier_free_guidance", True)
            return (UNCOND, COND) if cfg else (COND, PERTURBED)
        if rest or slabs != 1:
            raise ValueError(
                f"The denoiser was called with {rows} rows, which is no whole number of branches "
                f"of {self.unit} rows each. A callback that turns classifier-free guidance off "
                f"should keep the last {self.unit} or {2 * self.unit} rows of every embedding."
            )
        return (COND,)

    def _prepare(
        self,
        call: Call,
        layout: tuple[str, ...],
        frames: int,
        found: Findings,
        *,
        same: bool,
        step: int,
    ) -> None:
        """Write down, for everything on the model, what the forward that follows runs on."""
        state = self.installed.state
        if self._difference is not None:
            # steps with and without the perturbed rows take turns: what is kept has rows of both
            state.context = f"{self._pass} {len(layout)}"
        state.slabs = self._rows.slabs(call, layout, frames, self.unit, found, same=same)
        if self.ranks is not None:
            layout, same = self._own_rows(call, layout, frames, found, same=same)
        self.advance(self._kept, call, found, same)
        align_residuals(call, len(layout), self.unit, frames, state, self.installed.plan)
        self.installed.prepare(latents_of(call), step)

    def _own_rows(
        self, call: Call, layout: tuple[str, ...], frames: int, found: Findings, *, same: bool
    ) -> tuple[tuple[str, ...], bool]:
        """On ranks: leave this one's rows alone in the arguments."""
        raise NotImplementedError

    def advance(self, kept: ConditioningCache, call: Call, found: Findings, same: bool) -> None:
        """What was kept of earlier forwards is good if conditioning and weights are the same."""
        # without a text the layers for it look at the image
        text = "encoder_hidden_states"
        same = same and not found.nothing_kept and (text not in call or call[text] is not None)
        kept.advance(latents_of(call), same=same)

    def begin_step(self) -> None:
        if self.patch.compilation is not None:
            self.patch.compilation.before_step()

    # ---- the combination ----

    def _combined(self, out: Any) -> Any:
        """What the pipeline gets; one that has PAG combines the branches by :meth:`combine`."""
        return out

    def forget(self) -> None:
        """Behind the last step: what follows it, decoding, is where memory runs short."""
        self._kept.forget()
        if self._graphs is not None:
            self._graphs.forget()
        self.controlnets.forget()
