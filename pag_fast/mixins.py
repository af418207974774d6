"""What a patched pipeline does differently: overrides of the few methods that concern PAG.

Every class here is mixed in front of the pipeline's own class by :mod:`pag_fast.patching`. The
pipeline's ``__call__`` is untouched: it calls these methods in place of its own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from .pipelines.registry import description_of
from .runtime.own_code import check_pair, is_replaced
from .sag.pipeline import PatchedSagPipeline
from .settings.layers import Layers

if TYPE_CHECKING:
    from .runtime.patch_state import PatchState


class PatchedPipeline:
    """Begins a session where the pipeline would install its processors; combines the branches."""

    _pag_fast: PatchState

    def _set_pag_attn_processor(
        self, pag_applied_layers: Any, do_classifier_free_guidance: bool
    ) -> None:
        session = self._pag_fast.session
        if session is None:  # called by hand, outside of a pipeline call
            return super()._set_pag_attn_processor(  # type: ignore[misc]
                pag_applied_layers=pag_applied_layers,
                do_classifier_free_guidance=do_classifier_free_guidance,
            )
        session.begin(pag_applied_layers, do_classifier_free_guidance)

    def _apply_perturbed_attention_guidance(
        self,
        noise_pred: torch.Tensor,
        do_classifier_free_guidance: bool,
        guidance_scale: float,
        t: Any,
        return_pred_text: bool = False,
    ) -> Any:
        session = self._pag_fast.session
        if session is None or session.ran is None or session.code.combines:
            if session is not None and session.ran is not None:
                session.stock_combines()
            return super()._apply_perturbed_attention_guidance(  # type: ignore[misc]
                noise_pred, do_classifier_free_guidance, guidance_scale, t, return_pred_text
            )
        combined, cond = session.combine(
            noise_pred, float(guidance_scale), rescales=isinstance(self, RescalesOnce)
        )
        return (combined, cond) if return_pred_text else combined

    def set_pag_applied_layers(
        self, pag_applied_layers: Layers, pag_attn_processors: Any = None
    ) -> None:
        """Choose the perturbed layers; takes every form :func:`pag_fast.patch` takes.

        The processors follow from the model: a pair given here has to be one of diffusers' own.
        """
        check_pair(pag_attn_processors)
        if self._is_own("set_pag_applied_layers"):
            self._set_own_layers(pag_applied_layers, pag_attn_processors)
            return
        if pag_attn_processors is not None:
            self._pag_attn_processors = pag_attn_processors
        self.pag_applied_layers = self._pag_fast.checked_layers(self, pag_applied_layers)

    def _is_own(self, name: str) -> bool:
        """Whether the class has somebody else's code in the place of diffusers'."""
        return is_replaced(self._pag_fast.original_class, name)

    def _set_own_layers(self, *given: Any) -> None:
        """By a method of somebody else's, which may set others than it is given."""
        before = self.pag_applied_layers, self._pag_attn_processors
        try:
            super().set_pag_applied_layers(*given[: 1 + (given[1] is not None)])  # type: ignore[misc]
            check_pair(self._pag_attn_processors)
            wanted = self._pag_fast.checked_layers(self, self.pag_applied_layers)
        except BaseException:
            self.pag_applied_layers, self._pag_attn_processors = before
            raise
        self.pag_applied_layers = wanted

    @property
    def pag_attn_processors(self) -> dict[str, Any]:
        """The processors of the perturbed layers by name, while a call runs."""
        session = self._pag_fast.session
        if session is None or not session.pag or self._is_own("pag_attn_processors"):
            return super().pag_attn_processors  # type: ignore[misc]
        installed = session.installed
        return {f"{name}.processor": found for name, found in installed.processors.items()}

    def maybe_free_model_hooks(self) -> None:
        if self._pag_fast.session is not None:
            self._pag_fast.session.freed = True
        super().maybe_free_model_hooks()  # type: ignore[misc]


class InjectedPipeline:
    """A pipeline without PAG, with the attributes that the PAG pipelines of diffusers have."""

    _pag_fast: PatchState

    @property
    def pag_scale(self) -> float:
        """PAG's scale s, of the running call or of calls that do not name one."""
        return self._pag_fast.pag_scale

    @property
    def pag_adaptive_scale(self) -> float:
        """How fast the scale falls over the timesteps, likewise."""
        return self._pag_fast.pag_adaptive_scale

    @property
    def pag_applied_layers(self) -> list[str | int]:
        """The perturbed layers."""
        return self._pag_fast.layers

    @property
    def do_perturbed_attention_guidance(self) -> bool:
        """Whether there is a perturbed branch."""
        return self.pag_scale > 0.0

    def set_pag_applied_layers(self, pag_applied_layers: Layers) -> None:
        """Choose the perturbed layers; takes every form :func:`pag_fast.patch` takes."""
        self._pag_fast.layers = self._pag_fast.checked_layers(self, pag_applied_layers)

    def maybe_free_model_hooks(self) -> None:
        if self._pag_fast.session is not None:
            self._pag_fast.session.freed = True
        super().maybe_free_model_hooks()  # type: ignore[misc]


class RescalesOnce:
    """CFG rescale happens inside the guidance op, so the pipeline must not do it a second time.

    (StableDiffusionPAGInpaintPipeline would crash there: it has not kept the cond prediction.)
    """

    _pag_fast: PatchState
    _guidance_rescale: float

    @property
    def guidance_rescale(self) -> float:
        session = self._pag_fast.session
        if session is None or session.code.rescales:
            own: float = super().guidance_rescale  # type: ignore[misc]
            return own
        if session.rescaled:
            # read by the pipeline right behind the combination; anybody else sees the real value
            session.rescaled = False
            return 0.0
        return self._guidance_rescale


class GuessModeImages:
    """In guess mode ``prepare_image`` leaves the images undoubled, and the pipeline halves them."""

    def prepare_image(self, *args: Any, **kwargs: Any) -> Any:
        prepare = super().prepare_image  # type: ignore[misc]
        bound = inspect.signature(prepare).bind(*args, **kwargs)
        if "guess_mode" in bound.arguments:
            bound.arguments["guess_mode"] = False
        return prepare(*bound.args, **bound.kwargs)


class MaskOfImageLatents:
    """With image latents as input there are no masked image latents; the PAG branch chunks them."""

    def prepare_mask_latents(self, *args: Any, **kwargs: Any) -> Any:
        mask, masked = super().prepare_mask_latents(*args, **kwargs)  # type: ignore[misc]
        # a 4-channel UNet never looks at the second one
        unused = masked is None and self.unet.config.in_channels == 4  # type: ignore[attr-defined]
        return mask, mask if unused else masked


def mixins(cls: type, *, injected: bool = False) -> tuple[type, ...]:
    """The overrides that a pipeline class needs, in the order of inheritance.

    ``injected``: it gets PAG, whatever its class has.
    """
    if injected:
        return (InjectedPipeline,)
    description = description_of(cls)
    assert description is not None
    if description.kind == "sag":
        return (PatchedSagPipeline,)
    if description.kind == "injected":
        return (InjectedPipeline,)
    if description.kind == "stock":
        return ()
    found: list[type] = [PatchedPipeline]
    if description.rescales_again:
        found.append(RescalesOnce)
    if description.guess_mode_images:
        found.append(GuessModeImages)
    if description.mask_of_image_latents:
        found.append(MaskOfImageLatents)
    return tuple(found)
