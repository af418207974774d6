"""The guidance of a step: scales, whether the perturbed branch has to run, the combination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..models.registry import COND, PERTURBED, UNCOND
from ..sharing.guidance_reuse import Difference
from .compatibility.findings import Findings
from .guidance import place_of, scale_at, scales_ahead, steps_of_call
from .installation import Installation

if TYPE_CHECKING:
    from .patch_state import PatchState


class Guided:
    """The part of a session that knows of guidance, and nothing of models.

    Attributes:
        ran: what the latest forward returned: its branches in order, and the scale of each
            perturbed one.
        rescaled: CFG rescale has been applied to the current prediction.
        forwards: how many forwards were ours so far.
    """

    installed: Installation

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
        self.begin_guidance()

    def begin_guidance(self) -> None:
        """A loop begins, with pictures of its own."""
        reuse = self.patch.config.reuse
        self._difference = None if reuse is None else Difference(reuse)

    def forget(self) -> None:
        """Behind the last step: what follows it, decoding, is where memory runs short."""
        raise NotImplementedError

    # ---- rescale ----

    def _own_rescale(self) -> float:
        """The ``guidance_rescale`` of the pipeline's call."""
        return float(getattr(self.pipe, "_guidance_rescale", 0.0))

    def refuse_two_rescales(self) -> None:
        """Raises ValueError where both the call and the patch rescale the guidance."""
        own, mode = self._own_rescale(), self.patch.config.rescale_mode
        if mode is not None and own > 0.0:
            raise ValueError(
                f"The call has guidance_rescale={own!r} and the patch rescale_mode={mode!r}: leave "
                "one of them out."
            )

    # ---- scales, and steps without the perturbed branch ----

    def _scales_at(self, timestep: Any) -> tuple[float, ...]:
        """The guidance scale of each perturbed branch."""
        pipe, schedule = self.pipe, self.patch.config.schedule
        branches = self.installed.branches
        if schedule is not None and any(
            pipe.pag_scale if branch.scale is None else branch.scale for branch in branches
        ):
            timestep = place_of(pipe, timestep, self._scales)
        self._now = timestep
        return tuple([scale_at(pipe, timestep, self._scales, schedule, x.scale) for x in branches])

    def _drops(self, scales: tuple[float, ...], latents: torch.Tensor, found: Findings) -> bool:
        """Whether a step does without the perturbed rows."""
        if found.keep_rows:
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
        elif uncond is not None and rescales:
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
