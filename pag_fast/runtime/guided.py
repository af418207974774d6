"""The guidance of a step: scales, whether the perturbed branch has to run, the combination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..models.registry import COND, PERTURBED, UNCOND
from ..sharing.guidance_reuse import Difference
from .access.forwards import Call
from .access.frames import calling_frame, equal_by_construction
from .compatibility.findings import Findings
from .guidance import place_of, scale_at, scales_ahead, steps_of_call
from .installation import Installation
from .loops.order import EARLIER, SAME, SEVERAL, StepOrder
from .own_code import STOCK, OwnCode, check_options, look_at, look_at_host

if TYPE_CHECKING:
    from .patch_state import PatchState


class Guided:
    """The part of a session that knows of guidance, and nothing of models.

    Attributes:
        ran: what the latest forward returned: its branches in order, and the scale of each
            perturbed one.
        rescaled: CFG rescale has been applied to the current prediction.
        forwards: how many forwards were ours so far.
        code: what of the guidance is somebody else's code, since the loop has begun.
    """

    installed: Installation
    # the batch gets its perturbed rows from us, and not from the pipeline
    _adds_rows = False
    code: OwnCode = STOCK

    def __init__(self, pipe: Any, patch: PatchState) -> None:
        self.pipe = pipe
        self.patch = patch
        self.ran: tuple[tuple[str, ...], tuple[float, ...]] | None = None
        self.rescaled = False
        self.unit = 0
        self.forwards = 0
        self._scales: dict[Any, Any] = {}
        # the scheduler's timestep of this forward, or its place as soon as that has been looked up
        self._now: Any = None
        self._difference: Difference | None = None
        self._order = StepOrder()
        self._locals: dict[str, Any] = {}
        self.begin_guidance()

    def begin_guidance(self) -> None:
        """A loop begins, with pictures of its own."""
        reuse = self.patch.config.reuse
        self._difference = None if reuse is None else Difference(reuse)
        self._order = StepOrder()

    def forget(self) -> None:
        """Behind the last step: what follows it, decoding, is where memory runs short."""
        raise NotImplementedError

    def equal_by_construction(self) -> bool:
        """Whether branches begin with copies of one row, in every step of the running loop."""
        return equal_by_construction()

    # ---- code of somebody else's ----

    def _own_code(self) -> OwnCode:
        """What of the guidance is somebody else's code, now that the loop is about to run."""
        if self.patch.host is not None:
            return look_at_host(self.patch.original_class)
        pipe, frame = calling_frame()
        loop = frame if pipe is self.pipe else None
        return look_at(self.pipe, self.patch.original_class, self.patch.config, loop)

    def check_combined(self) -> None:
        """Tell of functions on the pipeline that do without ours.

        Raises:
            ValueError: they combine, and there are options of our combination; or with
                ``strict=True`` they install processors.
        """
        if "_set_pag_attn_processor" in vars(self.pipe) and self.does_without():
            self.patch.fall_back(
                "the pipeline has its own _set_pag_attn_processor, set on this instance: the call "
                "ran as stock does"
            )
        if self.code.wraps and self.ran is not None:
            name = "_apply_perturbed_attention_guidance"
            check_options(type(self.pipe), self.patch.config, name)

    def does_without(self) -> bool:
        """Whether the call had PAG, and nothing of it has come by here."""
        return self.ran is None and not self.forwards and self.pipe.do_perturbed_attention_guidance

    def stock_combines(self) -> None:
        """The pipeline combines the branches by itself."""
        self.ran = None
        if self.forwards == steps_of_call(self.pipe):
            self.forget()

    # ---- rescale ----

    def _own_rescale(self) -> float:
        """The ``guidance_rescale`` of the pipeline's call."""
        name = "guidance_rescale" if self.code.rescales else "_guidance_rescale"
        return float(getattr(self.pipe, name, None) or 0.0)

    def refuse_two_rescales(self) -> None:
        """Raises ValueError where both the call and the patch rescale the guidance."""
        own, mode = self._own_rescale(), self.patch.config.rescale_mode
        if mode is not None and own > 0.0:
            raise ValueError(
                f"The call has guidance_rescale={own!r} and the patch rescale_mode={mode!r}: leave "
                "one of them out."
            )

    def blame(self, error: Exception, found: Findings) -> None:
        """Raise ValueError where a forward fails because of what others have put on the model."""
        if not found.stock_pag:
            self.installed.refuse_taken(error)
        if self._adds_rows:
            found.refuse_rows(error)

    # ---- scales, and steps without the perturbed branch ----

    def _scales_at(self, timestep: Any) -> tuple[float, ...]:
        """The guidance scale of each perturbed branch."""
        pipe, schedule = self.pipe, self.patch.config.schedule
        branches = self.installed.branches
        if self.code.combines:  # it has a scale of its own, which nobody else may ask for
            return (1.0,) * len(branches)
        if schedule is not None and any(
            pipe.pag_scale if branch.scale is None else branch.scale for branch in branches
        ):
            timestep = place_of(pipe, timestep, self._scales)
        self._now = timestep
        return tuple([scale_at(pipe, timestep, self._scales, schedule, x.scale) for x in branches])

    def _drops(
        self, scales: tuple[float, ...], call: Call, latents: torch.Tensor, found: Findings
    ) -> bool:
        """Whether a step does without the perturbed rows."""
        if self.code.wraps:
            self.check_combined()
        if self._difference is not None and not self._difference.is_off:
            # in steps without a scale, too: time may go back to in front of the first that has one
            order = self._order.look(self.pipe.scheduler, call, self._locals)
            if order == EARLIER:
                self._difference.drop()
            elif order == SAME:
                self._difference.turn_off()
                self.patch.fall_back(SEVERAL)
        # somebody else's code takes the rows of every branch apart
        if found.keep_rows or self.code.wraps or self.code.combines:
            if self._difference is not None:
                self._difference.drop()  # the rows run, and count as what they predict
            return False
        if not any(scales):
            self.patch.steps["perturbed branch dropped"] += 1
            return True
        if self._difference is not None and self._difference.serves(latents[-self.unit :]):
            self.patch.steps["difference reused"] += 1
            return True
        return False

    def _ahead(self) -> Iterator[bool]:
        """Of this step and those that follow, as far as can be told: do they have a scale?"""
        if self.code.wraps or self.code.combines:
            return iter((True,))
        pipe, schedule = self.pipe, self.patch.config.schedule
        if schedule is not None or float(pipe.pag_adaptive_scale) > 0.0:
            self._now = place_of(pipe, self._now, self._scales)
        scales = [
            scales_ahead(pipe, self._now, self._scales, schedule, branch.scale)
            for branch in self.installed.branches
        ]
        return (any(step) for step in zip(*scales, strict=True))

    # ---- the combination ----

    def predictions(
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
            if perturbed is not None and scale:
                # s·(c − p) of one p is the sum over all
                weighted = zip(scales, slabs[-len(scales) :], strict=True)
                perturbed = torch.stack([s / scale * p.to(wide) for s, p in weighted]).sum(0)
        if not scale:
            perturbed = None
        elif self._difference is not None:
            perturbed = self._difference.perturbed(cond, perturbed)
        return uncond, cond, perturbed, scale

    def combine(
        self, noise_pred: torch.Tensor, guidance_scale: float, *, rescales: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(guided prediction, cond prediction)`` from the rows the denoiser returned.

        Args:
            rescales: the pipeline leaves its ``guidance_rescale`` to the guidance op.
        """
        if self.forwards == steps_of_call(self.pipe):
            self.forget()
        channels = noise_pred.shape[1]
        sigma = self.installed.learned_sigma
        useful = noise_pred[:, : channels // 2] if sigma else noise_pred
        config, rescale = self.patch.config, 0.0
        uncond, cond, perturbed, scale = self.predictions(useful)
        # once: a forward that was not ours is combined as stock does
        self.ran = None
        if config.rescale_mode is not None:
            rescale = config.rescale or 0.0
        elif uncond is not None and rescales and not self.code.rescales:
            rescale = self._own_rescale()
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
