"""One call of a patched pipeline: what is installed for it, what each model call runs on.

Everything a session puts in place (attention processors, forward hooks) goes when the pipeline's
``__call__`` ends, whichever way it ends. Between calls the models are exactly as diffusers made
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from ..fusion import Lean
from ..models.registry import COND, PERTURBED, UNCOND, controlnets, denoiser_name, uncompiled
from ..pipelines.mixins import RescalesOnce
from ..sharing.arguments import (
    ADAPTER,
    MID_RESIDUAL,
    RESIDUALS,
    batched,
    change_rows,
    frames_of,
    knows_places,
    latents_of,
    mend_rows,
)
from ..sharing.conditioning_cache import Kept
from ..sharing.guidance_reuse import Difference
from ..sharing.plan import install
from ..sharing.row_equality import Premise
from ..sharing.rows import SPLIT, change_level
from .controlnets import WatchedControlNets
from .guidance import scale_at, scales_ahead
from .installation import enter_with, is_eager, restore_processor

if TYPE_CHECKING:
    from .patch_state import Patch


class Session:
    """The state of one running call.

    Attributes:
        ran: what the latest denoiser call returned: its branches in order, and the scale of each
            perturbed one.
        rescaled: CFG rescale has been applied to the current prediction.
        freed: the pipeline has offloaded its models at the end of the call.
    """

    def __init__(self, pipe: Any, patch: Patch, watched: bool, denoiser: str | None = None) -> None:
        self.pipe = pipe
        self.denoiser = denoiser or denoiser_name(pipe)
        self.patch = patch
        self.watched = watched
        self.ran: tuple[tuple[str, ...], tuple[float, ...]] | None = None
        self._decided: tuple[int, int, int] = (0, 0, 0)
        self._decided_for: tuple[str, ...] = ()
        self.rescaled = False
        self.freed = False
        self.pag = False
        self.cfg = False
        self._warming = False
        self.unit = 0
        self._undo: list[Callable[[], None]] = []
        self._leans: list[Lean] = []
        self._scales: dict[Any, Any] = {}
        self._looked_ahead: set[Any] = set()
        self._calls = 0
        self.controlnets = WatchedControlNets(self)
        self._difference = None if patch.config.reuse is None else Difference(patch.config.reuse)

    # ---- installing and removing ----

    def open(self) -> None:
        """Before the pipeline runs: watch its ControlNets, whether PAG will be on or not."""
        self._undo += self.controlnets.open()

    def begin(self, layers: Any, cfg: bool) -> None:
        """The pipeline is about to denoise with PAG: install processors and hooks.

        Raises:
            ValueError: a layer that does not exist, a model whose batch is split inside, or rescale
                asked for twice.
        """
        denoiser = getattr(self.pipe, self.denoiser)
        model = uncompiled(denoiser)
        _refuse_split_inference(model)
        _refuse_two_rescales(self._own_rescale(), self.patch.config.rescale_mode)
        eager = is_eager(denoiser, model)
        self.installed = self.patch.installation(model, layers, eager=eager)
        self._kept = Kept(self.installed.state)
        self._premise = Premise()
        self.pag, self.cfg = True, cfg
        if self.installed.plan.reason and self.patch.config.share_branches:
            self.patch.fall_back(f"branches are not shared: {self.installed.plan.reason}")
        for name, attention in self.installed.attentions.items():
            processor = self.installed.processors[name]
            self._undo.append(restore_processor(attention, attention.processor, processor))
            attention.set_processor(processor)
        self._undo += [handle.remove for handle in install(self.installed.hooks)]
        self._undo += self._kept.install(self.installed.invariants.values())
        self._install_leans()
        self._undo += enter_with(denoiser, self.enter_denoiser, self._leave())

    def _own_rescale(self) -> float:
        """The ``guidance_rescale`` of the pipeline's call."""
        return float(getattr(self.pipe, "_guidance_rescale", 0.0))

    def _leave(self) -> Callable[[Any], Any] | None:
        """What is done with the denoiser's output, if anything."""
        compilation = self.patch.compilation
        return None if compilation is None else compilation.after_model

    def _install_leans(self) -> None:
        """Not before PAG is known to be on: without it, a call is stock's to the last bit."""
        pairs = [(self.installed.lean, self.installed.state)]
        controlnet = getattr(self.pipe, "controlnet", None)
        if controlnet is not None and self.patch.config.fewer_launches:
            nets = [net for net in controlnets(controlnet) if is_eager(controlnet, net)]
            pairs += [(self.patch.lean(net), self.controlnets.state) for net in nets]
        for lean, state in pairs:
            if lean is not None:
                self._undo += lean.install(state)
                self._leans.append(lean)

    def end(self) -> None:
        """Take everything off again, in reverse order."""
        while self._undo:
            self._undo.pop()()
        if self.pag:
            self.installed.forget()

    # ---- a step ----

    def layout(self, rows: int) -> tuple[str, ...]:
        """Which branches a batch of ``rows`` rows holds."""
        if not self.unit:
            self.unit = rows // (3 if self.cfg else 2)
        slabs, rest = divmod(rows, self.unit) if self.unit else (0, 1)
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

    def enter_denoiser(self, call: dict[str, Any]) -> dict[str, Any]:
        """Decide what this denoiser call runs on, and give its arguments those rows."""
        if self._warming:
            return call
        if getattr(self.pipe, "controlnet", None) is None:
            self.begin_step()
        sample = latents_of(call)
        rows, frames = sample.shape[0], frames_of(call)
        self._calls += 1
        layout = self.layout(rows)
        same = self._premise.same_objects(call, rows)
        if not same:
            self._decided_for = ()
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
        drops = layout[-1] == PERTURBED and self._drops(scales, sample)
        if self.patch.compilation is not None and layout[-1] == PERTURBED:
            self._warm(call, layout, frames, dropped=drops)
        if drops:
            call = change_rows(call, rows, frames, len(layout), len(layout) - branches)
            layout = layout[:-branches]
        state = self.installed.state
        state.slabs = self._slabs(call, layout, frames, same)
        self.advance(self._kept, call, same)
        self._align_residuals(call, len(layout))
        self.installed.prepare(latents_of(call), self._calls - 1)
        self.ran = layout, scales
        return call

    def _scales_at(self, timestep: Any) -> tuple[float, ...]:
        """The guidance scale of each perturbed branch."""
        schedule = self.patch.config.schedule
        return tuple(
            [
                scale_at(self.pipe, timestep, self._scales, schedule, branch.scale)
                for branch in self.installed.branches
            ]
        )

    def _drops(self, scales: tuple[float, ...], latents: torch.Tensor) -> bool:
        """Whether a step does without the perturbed rows."""
        if not any(scales):
            self.patch.steps["perturbed branch dropped"] += 1
            return True
        if self._difference is not None and self._difference.serves(latents[-self.unit :]):
            self.patch.steps["difference reused"] += 1
            return True
        return False

    def _predictions(
        self, prediction: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, float]:
        """Uncond, cond, one perturbed prediction that stands for all, and its scale.

        With several branches in fp32, to be rounded once. What was not run may be had by the
        difference of an earlier step.
        """
        assert self.ran is not None
        layout, scales = self.ran
        slabs = prediction.chunk(len(layout))
        branches, scale = dict(zip(layout, slabs, strict=True)), sum(scales)
        uncond, cond, perturbed = branches.get(UNCOND), branches[COND], branches.get(PERTURBED)
        if len(scales) > 1:
            wide = torch.promote_types(prediction.dtype, torch.float32)
            uncond, cond = None if uncond is None else uncond.to(wide), cond.to(wide)
            if perturbed is not None:
                # s·(c − p) of one p is the sum over all
                weighted = zip(scales, slabs[-len(scales) :], strict=True)
                perturbed = torch.stack([s / scale * p.to(wide) for s, p in weighted]).sum(0)
        if self._difference is not None and scale:
            if perturbed is None:
                perturbed = self._difference.perturbed(cond)
            else:
                self._difference.hold(cond, perturbed)
        return uncond, cond, perturbed, scale

    def begin_step(self) -> None:
        if self.patch.compilation is not None:
            self.patch.compilation.before_step()

    def _warm(
        self, call: dict[str, Any], layout: tuple[str, ...], frames: int, *, dropped: bool
    ) -> None:
        """Compile now, not then, what a later step needs.

        Where this step drops the perturbed branch that is the model with it, else without.
        """
        compilation, latents, full = self.patch.compilation, latents_of(call), len(layout)
        assert compilation is not None
        key = latents.shape, latents.dtype, full
        if key in compilation.warmed or key in self._looked_ahead:
            return
        self._looked_ahead.add(key)
        if self._difference is None and all(runs != dropped for runs in self._ahead(call)):
            return
        compilation.warmed.add(key)
        if dropped:
            other, rows, counted = dict(call), full, self.patch.steps.copy()
            self.installed.state.slabs = self._slabs(other, layout, frames, False)
            self.patch.steps = counted
        else:
            rows = full - len(self.installed.branches)
            other = change_rows(dict(call), latents.shape[0], frames, full, rows)
            self.installed.state.slabs = None
        self.advance(self._kept, other, False)
        self._align_residuals(other, rows)
        self._warming = True
        try:
            getattr(self.pipe, self.denoiser)(**other)
        finally:
            self._warming = False

    def _ahead(self, call: dict[str, Any]) -> Iterator[bool]:
        """Of this step and those that follow, as far as can be told: do they have a scale?"""
        schedule = self.patch.config.schedule
        scales = [
            scales_ahead(self.pipe, self._scheduled(call), self._scales, schedule, branch.scale)
            for branch in self.installed.branches
        ]
        return (any(step) for step in zip(*scales, strict=True))

    def _scheduled(self, call: dict[str, Any]) -> Any:
        """The scheduler's timestep of a model call."""
        return call["timestep"]

    def advance(self, kept: Kept, call: dict[str, Any], same: bool) -> None:
        kept.advance(latents_of(call), same=same, watched=self.watched)
        if self.watched:
            for lean in self._leans:
                lean.check()

    def _slabs(
        self, call: dict[str, Any], layout: tuple[str, ...], frames: int, same: bool
    ) -> tuple[int, int, int] | None:
        if layout[-1] != PERTURBED:
            return None
        full = len(layout)
        if self.installed.plan.reason:
            self.patch.steps["not shared"] += 1
            return full, full, full
        if self.installed.plan.shuffled and knows_places(call):
            self.patch.fall_back(
                "masks or residuals tell tokens apart by where they are: shuffled branches run "
                "apart"
            )
            self.patch.steps["not shared"] += 1
            return full, full, full
        if call.get(ADAPTER) is not None:
            # some are added in place, to a tensor of which a skip may already be a copy
            self.patch.fall_back("T2I-Adapter residuals: the branches run apart")
            self.patch.steps["not shared"] += 1
            return full, full, full
        if same and not self.watched and self._decided_for == layout:
            self.patch.steps["shared" if self._decided[1] < full else "not shared"] += 1
            return self._decided
        self._decided = self._decide(call, full, frames)
        self._decided_for = layout
        return self._decided

    def _decide(self, call: dict[str, Any], full: int, frames: int) -> tuple[int, int, int]:
        """Compare the rows of the branches."""
        everything = batched(call, full * self.unit, frames)
        shared = full - len(self.installed.branches)
        differing = self._differing(everything, full, shared)
        if differing:
            self.patch.fall_back(
                f"cond and perturbed rows differ in {', '.join(differing)}: they run apart"
            )
            self.patch.steps["not shared"] += 1
            return full, full, full
        self.patch.steps["shared"] += 1
        return self._merged(everything, full, shared), shared, full

    def _differing(self, everything: dict[str, torch.Tensor], full: int, shared: int) -> list[str]:
        """Names of the arguments in which cond and the perturbed branch differ."""
        return self._premise.differing(
            everything, full, shared - 1, shared, key="cond", recheck=self._recheck()
        )

    def _recheck(self) -> bool:
        """A mask concatenated to the latents can be replaced by a callback; the latents cannot."""
        return self.watched and self.installed.denoiser.config.get("in_channels") == 9

    def _merged(self, everything: dict[str, torch.Tensor], full: int, shared: int) -> int:
        """Slabs at MERGED: one, where uncond and cond differ in their text alone."""
        if not (self.installed.plan.merged and shared == 2):
            return shared
        others = {
            n: x for n, x in everything.items() if n.split(".")[-1] not in self.installed.text
        }
        differing = self._premise.differing(
            others, full, 0, 1, key="uncond", recheck=self._recheck()
        )
        return 2 if differing else 1

    def _align_residuals(self, call: dict[str, Any], full: int) -> None:
        """ControlNet residuals: each with the rows of the tensor it is added to."""
        slabs, plan = self.installed.state.slabs, self.installed.plan

        def align(residual: torch.Tensor, level: int) -> torch.Tensor:
            want = full if slabs is None else slabs[level]
            if residual.shape[0] % self.unit:
                return residual
            return change_level(residual, residual.shape[0] // self.unit, want)

        if call.get(RESIDUALS) is not None:
            levels = plan.residual_levels or (SPLIT,) * len(call[RESIDUALS])
            pairs = zip(call[RESIDUALS], levels, strict=False)
            call[RESIDUALS] = [align(residual, level) for residual, level in pairs]
        if call.get(MID_RESIDUAL) is not None:
            call[MID_RESIDUAL] = align(call[MID_RESIDUAL], plan.mid_level)

    # ---- the combination ----

    def _forget(self) -> None:
        """Behind the last step: what follows it, decoding, is where memory runs short."""
        self._kept.forget()
        self.controlnets.kept.forget()

    def combine(
        self, noise_pred: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(guided prediction, cond prediction)`` from the rows the denoiser returned."""
        assert self.ran is not None
        layout, scales = self.ran
        if self._calls == getattr(self.pipe, "_num_timesteps", None):
            self._calls = 0
            self._forget()
        channels = noise_pred.shape[1]
        sigma = self.installed.learned_sigma
        useful = noise_pred[:, : channels // 2] if sigma else noise_pred
        config, rescale = self.patch.config, 0.0
        uncond, cond, perturbed, scale = self._predictions(useful)
        if config.rescale_mode is not None:
            rescale = config.rescale or 0.0
        elif uncond is not None and isinstance(self.pipe, RescalesOnce):
            rescale = float(self.pipe._guidance_rescale)
            self.rescaled = rescale > 0.0
        combined = ops.combine_guidance(
            uncond,
            cond,
            perturbed,
            guidance_scale=guidance_scale,
            pag_scale=scale,
            rescale=rescale,
            rescale_mode=config.rescale_mode or "cfg",
            backend=config.backend,
        ).to(useful.dtype)
        if sigma:
            # the pipeline splits the sigma channels off behind this point: give it some to split
            # off
            padded = combined.new_zeros((combined.shape[0], channels, *combined.shape[2:]))
            padded[:, : channels // 2] = combined
            combined = padded
        return combined, cond.to(useful.dtype)


def _refuse_split_inference(model: nn.Module) -> None:
    if any(type(module).__name__ == "SplitInferenceModule" for module in model.modules()):
        raise ValueError(
            "FreeNoise's split inference cuts the batch inside the model, where uncond, cond and "
            "perturbed rows can no longer be told apart (stock diffusers perturbs the wrong rows). "
            "Use enable_free_noise() without enable_free_noise_split_inference()."
        )


def _refuse_two_rescales(own: float, mode: str | None) -> None:
    if mode is not None and own > 0.0:
        raise ValueError(
            f"The call has guidance_rescale={own!r} and the patch rescale_mode={mode!r}: leave one "
            "of them out."
        )
