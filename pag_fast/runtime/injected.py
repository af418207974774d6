"""A call of a pipeline that knows nothing of PAG: the perturbed branch lives in its denoiser.

Its loop calls the denoiser with ``[uncond | cond]``, or with the one and then the other, and
applies CFG itself. The denoiser's batch is extended by the perturbed rows on the way in and
combined on the way out. Where the pipeline's guidance is linear, ``d = s·(cond − perturbed)`` is
added to the output of every pass of the step, and nobody needs to know the CFG scale g: ``u + g·(c
− u)`` of ``u + d`` and ``c + d`` is ``u + g·(c − u) + d``. Where it is not (the result is
normalised or rescaled), the pipeline is given ``cond' = cond + d/g``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import COND, PERTURBED, UNCOND, family_of, uncompiled
from ..sharing.arguments import complete_rows, frames_of, latents_of
from ..sharing.plan import argument_names
from ..sharing.rows import change_level
from .access.forwards import Call, Forward
from .access.frames import LoopCode, call_arguments, loop_of
from .compatibility.findings import Findings
from .controlnets import InjectedControlNets
from .guidance import Place, guided_cond, steps_of_call
from .loops.loop import Loop, StepClock, unstepped
from .loops.observed import SKIP
from .loops.observed_guidance import REPEATS
from .loops.predictions import prediction_of, with_prediction
from .loops.prompts import pass_of_text
from .row_copies import Copies, turned, with_rows
from .session import Session
from .stock_passes import StockPasses
from .undoing import undo_all

if TYPE_CHECKING:
    from .patch_state import PatchState


class InjectedSession(Session):
    """As :class:`Session`, for one denoiser of a pipeline without PAG."""

    _adds_rows = True

    def __init__(self, pipe: Any, patch: PatchState, denoiser: str, loop: Loop) -> None:
        super().__init__(pipe, patch, denoiser)
        assert patch.host is not None
        self.controlnets = InjectedControlNets(self)
        self.host = patch.host
        self.loop = loop
        # the pipeline has cond in front of a batch, and not at its end
        self._cond_first = patch.host.cond_is_first
        self._scales = loop.scales
        family = family_of(uncompiled(getattr(pipe, denoiser)))
        self._sequence = family.sequence
        # only such a model may take its rows as a list
        self._lists = family.runs_stock
        self._arguments: dict[str, Any] | None = None
        self._stock: StockPasses | None = None
        self._copies_last = False
        self._extended: Copies = {}
        self._turned: Copies = {}
        self._pass = COND
        # what is added to other passes, of the step that it belongs to, and which those are
        self._pending: tuple[Any, torch.Tensor, tuple[str, ...]] | None = None
        self._seen: tuple[Any, list[str]] = (None, [])
        self._steps = StepClock(pipe)

    @property
    def steps(self) -> int:
        # of all denoisers: a pipeline with two may need only one of them
        return self.loop.step + 1

    def _running_loop(self) -> LoopCode:
        return loop_of(self.patch.described)

    def start(self) -> None:
        """The pipeline's call begins."""
        self.begin(self.patch.layers, cfg=True)
        own = self.host.stock_guidance if self.patch.config.share_branches else None
        if own is not None:
            denoiser, graphs = getattr(self.pipe, self.denoiser), self._graphs is not None
            self._stock = StockPasses(self.patch, self.pipe, denoiser, own, graphs=graphs)

    def install(self, layers: Any) -> None:
        super().install(layers)
        self.installed.be_strict()

    def begin_loop(self) -> None:
        super().begin_loop()
        self._arguments, self._seen, self._pending = None, (None, []), None
        # writes through .data and NumPy leave no trace, so copies last where nobody can write
        self._copies_last = self.patch.config.cache_conditioning and not self._kept.somebody_writes
        self.begin_guidance()
        # all denoisers of a pipeline have one loop
        if self._frame is not self.loop.frame:
            self.loop.begin(self._frame)

    def end(self, *, whole: bool) -> None:
        self.loop.frame = None
        self._extended, self._turned, self._pending, self._arguments = {}, {}, None, None
        stock = [] if self._stock is None else [self._stock.forget]
        undo_all(*stock, partial(super().end, whole=whole))

    def _own_rescale(self) -> float:
        own = super()._own_rescale() if self.code.rescales else 0.0
        return own or float(self._argument("guidance_rescale") or 0.0)

    def _argument(self, name: str) -> Any:
        return (self.arguments() or {}).get(name)

    def arguments(self) -> dict[str, Any] | None:
        """The locals of the pipeline's ``__call__``, looked up once; ``None`` in another loop."""
        if self._arguments is None and self._locals:
            found = call_arguments(self.pipe, self.patch.described)
            self._arguments = {} if found is None else found
        return self._arguments or None

    # ---- which pass of which step this is ----

    def _pass_of(self, call: Call) -> str:
        """Which pass a forward is: by its arguments, by whose text it gets, or by its place.

        Raises:
            ValueError: more passes in a step than there are names for.
        """
        key = self._steps.key(call, self._locals, self.forwards)
        if self._seen[0] != key:
            self._seen = key, []
        seen = self._seen[1]
        if call.get("skip_layers") is not None:
            found = SKIP  # SD3's skip-layer guidance
        elif not self.host.sequential:
            found = COND
        else:
            found = pass_of_text(self._locals, call) or (UNCOND if COND in seen else COND)
        if found in seen and found == COND:
            self.patch.fall_back(REPEATS)
        seen.append(found)
        return found

    def layout(self, rows: int) -> tuple[str, ...]:
        branches = self.host.rows
        both = self.host.passes == "together" and self._has_all(rows, len(branches))
        self.unit = rows // len(branches) if both else rows
        if not both:
            return (COND,)
        return branches[::-1] if self.host.cond_is_first else branches

    def _has_all(self, rows: int, branches: int) -> bool:
        """Whether a batch holds all branches of CFG, or cond alone.

        The loop's latents say so, by their own number of rows, or its name for CFG.
        """
        latents = self._locals.get("latents")
        if isinstance(latents, torch.Tensor) and latents.shape[0] and not rows % latents.shape[0]:
            slabs = rows // latents.shape[0]
            if slabs in (1, branches):
                return slabs == branches
        return self._cfg()

    def _cfg(self) -> bool:
        """Whether the running call uses CFG."""
        if self.host.passes == "alone":
            return False
        for name in ("do_true_cfg", "do_classifier_free_guidance"):
            if isinstance(self._locals.get(name), bool):
                return bool(self._locals[name])
        return bool(self.host.cfg(self.pipe, self.arguments() or {}))

    # ---- a forward ----

    def enter_denoiser(self, forward: Forward, found: Findings) -> Call:
        """As in :class:`Session`; what the pipeline guides by itself is kept, or resumed."""
        call = self._extended_call(forward, found)
        if self._stock is not None:
            above = self._stock.enter(forward.call, self._locals, found)
            self._above = (above, self._stock) if above.entries else None
        return call

    def _extended_call(self, forward: Forward, found: Findings) -> Call:
        """Extend the denoiser's batch by the perturbed rows, where they have a weight."""
        call = forward.call
        if self.loop.step < 0:
            self.refuse_two_rescales()
        if getattr(self.pipe, "controlnet", None) is None:
            self.begin_step()
        state, sample = self.installed.state, latents_of(call)
        rows, frames = sample.shape[0], frames_of(call)
        self._pass = self._pass_of(call)
        state.context = self._pass
        same = self._rows.same_objects(call, rows, self._locals, context=self._pass)
        call = complete_rows(call, rows, frames)
        if not self._copies_last:
            self._extended, self._turned = {}, {}
        if self._sequence is not None:
            state.num_contexts, state.num_image = self._sequence(self.installed.denoiser, call)
        if self._pass != COND:
            state.slabs, self.ran = None, None
            self.advance(self._kept, call, found, same)
            return call
        self.loop.step += 1
        layout = self.layout(rows)
        if self._cond_first and len(layout) > 1:
            have = len(layout)
            call, self._turned = with_rows(call, rows, frames, self._turned, turned, have, have)
        scales, branches = self._scales_at(self._scheduled(call)), len(self.installed.branches)
        drops = self._drops(scales, call, sample, found)
        if self.patch.compilation is not None or not drops:
            have = len(layout)
            extended, self._extended = with_rows(
                call, rows, frames, self._extended, change_level, have, have + branches
            )
            everything = layout + (PERTURBED,) * branches
            if self.patch.compilation is not None:
                self._warm(
                    forward, extended, everything, frames, found, dropped=drops, without=call
                )
            if not drops:
                call, layout = extended, everything
        if self.installed.runs is not None:
            self.installed.mark_tokens(call, layout)
        self._prepare(call, layout, frames, found, same=same, step=self.loop.step)
        self.ran = layout, scales
        return call

    def _scheduled(self, call: Call) -> Any:
        """Which of the scheduler's timesteps it is; models may get a function of it."""
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "step_index"):
            return call["timestep"] if "timestep" in call else self._locals["t"]
        index = scheduler.step_index
        if index is None:
            schedule, adaptive = self.patch.config.schedule, self.pipe.pag_adaptive_scale
            wanted = schedule is not None or adaptive > 0.0
            return unstepped(self.pipe, self.loop, call, self._locals, wanted=wanted)
        return Place(index)

    # ---- the combination ----

    def _combined(self, out: Any) -> Any:
        """The denoiser's output without perturbed rows: their difference is in the others."""
        if self._lists and not isinstance(out[0], torch.Tensor):
            # a model that takes a list of rows returns one
            found = self._combined(with_prediction(out, prediction_of(out)))
            return with_prediction(found, list(found[0].unbind(0)))
        prediction = out[0]
        if self._is_last_pass():
            self.forget()
        if self._pass != COND:
            return self._with_pending(out)
        self._pending = None
        uncond, cond, perturbed, scale = self.predictions(prediction)
        others: tuple[torch.Tensor, ...] = () if uncond is None else (uncond,)
        assert self.ran is not None
        layout, turned = self.ran[0], self._cond_first and uncond is not None
        if turned:
            others = prediction.chunk(len(layout))[: layout.index(COND)]
        config = self.patch.config
        if perturbed is None and not config.rescales_cfg:
            changed = turned or len(others) > 1 or PERTURBED in layout
            return self._result(out, [*others, cond]) if changed else out
        if perturbed is not None and self._is_linear():
            if UNCOND in self._seen[1]:
                raise ValueError(
                    "uncond ran before cond in this step, without its part of the guidance: a loop "
                    "of your own should run cond first."
                )
            wide = torch.promote_types(prediction.dtype, torch.float32)
            difference = scale * (cond.to(wide) - perturbed.to(wide))
            self._pending = self._seen[0], difference, (UNCOND, SKIP)
            return self._result(out, [x + difference for x in (*others, cond)])
        guided = guided_cond(
            uncond,
            cond,
            perturbed,
            self._cfg_scale(),
            scale,
            rescale=config.rescale,
            rescale_mode=config.rescale_mode,
            backend=config.backend,
        )
        if "skip_layers" in argument_names(self.installed.denoiser):
            # skip-layer guidance subtracts a pass from cond, and what is added here with it
            self._pending = self._seen[0], guided - cond, (SKIP,)
        return self._result(out, [*others, guided])

    def _with_pending(self, out: Any) -> Any:
        """Another pass than cond's, with what cond's has found for it in this step."""
        pending = self._pending
        if pending is None or pending[0] != self._seen[0] or self._pass not in pending[2]:
            return out
        prediction, difference = out[0], pending[1]
        if prediction.shape != difference.shape:
            raise ValueError(
                f"A pass of a step gives a prediction of {tuple(prediction.shape)}, and cond's is "
                f"of {tuple(difference.shape)}: PAG's difference does not fit. A loop of your "
                "own should run all passes of a step on the same latents."
            )
        return self._result(out, [prediction + difference])

    def _is_linear(self) -> bool:
        """Whether the guidance of a step is linear in the outputs of the denoiser."""
        patched = self.patch.config.rescale_mode is not None
        own = self.code.rescales and self.host.normalised_by and self._own_rescale()
        return not (patched or own or self.host.is_normalised(self.pipe, self.arguments() or {}))

    def _cfg_scale(self) -> float | None:
        """g of this step; ``None`` without CFG.

        Raises:
            ValueError: nobody knows it yet.
        """
        alone = self.host.passes == "together" and self.ran and UNCOND not in self.ran[0]
        if alone or not self._cfg():
            return None
        arguments = self.arguments()
        g = None
        if arguments is not None:
            g = self.host.scale(self.pipe, arguments, self.loop.step, self.denoiser)
        if g is None:
            raise ValueError(
                "The guidance of this call is normalised or rescaled, for which the scale of CFG "
                "has to be known, and it is not: leave out rescale_mode and guidance_rescale, use "
                "use_dynamic_cfg=False, or call the pipeline's own __call__."
            )
        return g

    def _result(self, out: Any, predictions: list[torch.Tensor]) -> Any:
        """A model's output, tuple or dataclass, with the predictions of other branches.

        In fp32 where the loop's latents are, as its own guidance then rounds nothing in between.
        """
        if self._cond_first:
            predictions = predictions[::-1]
        prediction, *more = predictions
        if more:
            prediction = torch.cat(predictions)
        latents, own = self._locals.get("latents"), out[0].dtype
        wide = isinstance(latents, torch.Tensor) and latents.dtype == torch.float32
        prediction = prediction.to(torch.promote_types(own, torch.float32) if wide else own)
        if isinstance(out, tuple) and not out[1:]:
            return (prediction,)
        return with_prediction(out, prediction, turned=self._cond_first and bool(more))

    def _is_last_pass(self) -> bool:
        if self.loop.step + 1 != steps_of_call(self.pipe):
            return False
        return self._pass != COND or not (self.host.sequential and self._cfg())
