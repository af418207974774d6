"""What both guiders share: which passes a step has, what each runs on, how they are combined."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.guiders.guider_utils import GuiderOutput
from torch import nn

from .. import ops
from ..models.registry import uncompiled
from ..models.traced.signatures import Signatures
from ..runtime.access.entry import Entry
from ..runtime.access.instance_patch import InstancePatch
from ..runtime.compatibility import Answer, Compatibility
from ..runtime.compatibility.findings import Findings
from ..sharing.plan import compiled_call
from .arming import Armed, release
from .derived import DerivedResumption
from .resumption import COND, PERTURBED, UNCOND, Change, Resumption

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

# what has to see every module run in every pass
_WHOLE = (Answer.UNSHARED, Answer.KEEP_ROWS, Answer.NOTHING_KEPT)


class ResumedGuidance(_Base):
    """Mixed into a guider of diffusers: its perturbed pass begins where it differs from cond's.

    The loop of a modular pipeline runs the denoiser once for each of the passes cond, uncond and
    perturbed, in this order, between :meth:`prepare_models` and :meth:`cleanup_models`. The model
    is changed only while one of these forwards runs, and left as it was also if one raises.
    """

    guidance_scale: float
    skip_layer_guidance_scale: float
    skip_layer_guidance_start: float
    skip_layer_guidance_stop: float
    guidance_rescale: float
    use_original_formulation: bool
    _resumptions: WeakKeyDictionary[nn.Module, Resumption]
    _stale: WeakSet[nn.Module]
    _armed: Armed | None
    _pass: tuple[nn.Module, str, bool] | None
    _warned: set[str]
    _compatibility: Compatibility
    _signatures: Signatures

    def _begin(
        self,
        guidance_scale: float,
        skip_scale: float,
        start: float,
        stop: float,
        guidance_rescale: float,
        use_original_formulation: bool,
    ) -> None:
        """What both constructors do; ``start`` and ``stop`` are those of the perturbation."""
        if not 0.0 <= start < 1.0 or not start <= stop <= 1.0:
            raise ValueError(
                "Perturbed guidance runs from a start to a stop with 0 <= start < 1 and "
                f"start <= stop <= 1, as shares of the steps; got {start} and {stop}."
            )
        self.__dict__.update(_runtime())
        self.guidance_scale = guidance_scale
        self.skip_layer_guidance_scale = skip_scale
        self.skip_layer_guidance_start = start
        self.skip_layer_guidance_stop = stop
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation

    def _make(self, model: nn.Module) -> Resumption:
        """The resumption of one denoiser; raises ValueError where its layers are not to be had."""
        raise NotImplementedError

    # ---- the protocol of modular pipelines ----

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begin a step; one that does not follow the last begins another call of the pipeline."""
        new_call = self._step is None or step <= self._step
        self._disarm()
        for resumption in self._resumptions.values():
            if new_call:
                resumption.begin()
            resumption.forget()
        super().set_state(step, num_inference_steps, timestep)
        if new_call:
            self._stale = WeakSet(self._resumptions)
            self._compatibility.begin()
            for resumption in self._resumptions.values():
                if isinstance(resumption, DerivedResumption):
                    resumption.compatibility.begin()

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Make the next forward of ``denoiser`` that of the next pass.

        Raises:
            ValueError: a denoiser that cannot be perturbed, or layers that it does not have.
        """
        self._disarm()
        release(denoiser)
        branch = self._passes()[min(self._count_prepared, self.num_conditions - 1)]
        self._count_prepared += 1
        model = uncompiled(denoiser)
        traced = model is not denoiser or compiled_call(model) is not None
        perturbs = self._is_slg_enabled()
        # a compiled model runs its other steps in the graph of this one
        if not perturbs and not (traced and self._perturbs_at_all()):
            return
        self._find(model)
        if traced and not self._resumptions[model].is_known:
            raise ValueError(
                f"{type(model).__name__} is compiled, and has no description by which its graphs "
                "could be the same in every step: leave it uncompiled with this guider."
            )
        self._pass = model, branch, traced
        self._armed = Armed(denoiser, self._forward)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """End a pass."""
        self._disarm()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch for each pass; the perturbed pass has the inputs of cond's."""
        return [
            self._prepare_batch(data, int(branch == UNCOND), branch) for branch in self._passes()
        ]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """As :meth:`prepare_inputs`, with fields of a block state."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(branch == UNCOND), branch)
            for branch in self._passes()
        ]

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last sees the prompt."""
        index = max(0, min(self._count_prepared, self.num_conditions) - 1)
        return self._passes()[index] != UNCOND

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_skip: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """Diffusers' formulas, with ``g`` and ``s`` the scales of CFG and of the perturbation.

        ``uncond + g·(cond − uncond) + s·(cond − perturbed)``; the original formulation begins with
        cond in the place of uncond. Without CFG, ``perturbed`` takes the place of ``uncond``: the
        scale 1 then is none. With ``guidance_rescale`` follows CFG rescale (arXiv 2305.08891).
        """
        if pred_uncond is None and pred_cond_skip is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        scale, skip_scale = float(self.guidance_scale), float(self.skip_layer_guidance_scale)
        if self.use_original_formulation:
            scale += 1.0
        elif pred_uncond is None:
            skip_scale -= 1.0
        pred = ops.combine_guidance(
            pred_uncond,
            pred_cond,
            pred_cond_skip,
            guidance_scale=scale,
            pag_scale=skip_scale,
            rescale=float(self.guidance_rescale),
        )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # ---- passes and steps ----

    def _passes(self) -> list[str]:
        passes = [COND]
        if self._is_cfg_enabled():
            passes.append(UNCOND)
        if self._is_slg_enabled():
            passes.append(PERTURBED)
        return passes

    def _perturbs_at_all(self) -> bool:
        return bool(self._enabled and abs(self.skip_layer_guidance_scale) > 1e-9)

    def _is_slg_enabled(self) -> bool:
        if not self._perturbs_at_all():
            return False
        if self._num_inference_steps is None:
            return True
        first, last = self._window(self._num_inference_steps)
        return first <= self._step <= last

    def _window(self, steps: int) -> tuple[int, int]:
        """The first and the last perturbed step.

        Those of diffusers, ``int(start·n) < step < int(stop·n)``, but step 0 is among them where
        start is 0, and where rounding leaves none there is one.
        """
        start, stop = self.skip_layer_guidance_start, self.skip_layer_guidance_stop
        first = 0 if start == 0 else int(start * steps) + 1
        last = int(stop * steps) - 1
        if first <= last or start == stop:
            return first, last
        first = min(first, steps - 1)
        self._warn(
            f"{start:g} to {stop:g} of {steps} steps holds no whole step, with which diffusers "
            f"would not perturb at all: step {first} is perturbed. Set the start and the stop of "
            "the guidance to choose other steps, or its scale to 0 for none."
        )
        return first, first

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # ---- forwards ----

    def _find(self, model: nn.Module) -> None:
        """See to it that there is a resumption of the model as it is now."""
        found = self._resumptions.get(model)
        if found is not None and model in self._stale:
            self._stale.discard(model)
            found = found if found.fits(model) else None
        if found is None:
            self._resumptions[model] = self._make(model)

    def _seen(
        self,
        entry: Entry,
        model: nn.Module,
        resumption: DerivedResumption,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Resumption:
        """The resumption of a model that nobody has described, for arguments like these."""
        assert self._armed is not None
        first, last = self._window(self._num_inference_steps or 1)
        while not resumption.see(entry, self._armed, model, self._signatures, args, kwargs):
            made = self._resumptions[model] = self._make(model)
            assert isinstance(made, DerivedResumption)
            resumption = made
        resumption.place = (self._step - first) / max(last - first, 1)
        if resumption.whole:
            self._warn(f"The perturbed pass runs as a whole: {resumption.whole}.")
        return resumption

    def _forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The denoiser's forward in the pass that was prepared last.

        Raises:
            ValueError: something on the denoiser that leaves no right answer.
        """
        assert self._pass is not None
        model, branch, traced = self._pass
        resumption, others = self._resumptions[model], self._compatibility
        if isinstance(resumption, DerivedResumption) and branch != UNCOND:
            others = resumption.compatibility
            resumption = self._seen(entry, model, resumption, args, kwargs)

        def run(changes: Sequence[Change], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            patch = InstancePatch([change.entry() for change in changes])
            return entry.run(lambda: patch, args, kwargs)

        found = Findings(others.look(model))
        found.refuse()
        whole = [answer for answer in _WHOLE if answer in found.answer]
        try:
            out = resumption.forward(
                model,
                branch,
                run,
                args,
                kwargs,
                traced=traced,
                resumed=self._is_slg_enabled(),
                apart=found.why(whole[0]) if whole else "",
                found=found,
                looks=others.looks,
            )
        except BaseException:
            resumption.forget()
            raise
        if branch == PERTURBED and resumption.reason and resumption.records:
            self._warn(f"The perturbed pass runs as a whole: {resumption.reason}")
        return out

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.disarm()
        self._armed = self._pass = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without what belongs to the models of the original."""
        left_out = _runtime()
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, **_runtime())


def _runtime() -> dict[str, Any]:
    """What a guider knows about the models that it has run."""
    return {
        "_resumptions": WeakKeyDictionary(),
        # those whose modules have to be looked at again
        "_stale": WeakSet(),
        "_armed": None,
        "_pass": None,
        "_warned": set(),
        # of arguments of models that nobody has described
        "_signatures": Signatures(),
        # what others have put on them; every pass is a forward of its own
        "_compatibility": Compatibility(passes_apart=True),
    }
