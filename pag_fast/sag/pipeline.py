"""What a patched ``StableDiffusionSAGPipeline`` does differently."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .patch import SagPatch


class Predicted(NamedTuple):
    """Latents and what the model made of them, in place of the x₀ they stand for."""

    sample: torch.Tensor
    model_output: torch.Tensor


class PatchedSagPipeline:
    """Hands the predictions on to ``sag_masking``, where one op does all that they are for.

    Outside of a call, and for anybody who has stored a map of their own, the methods are stock's.
    """

    _pag_fast: SagPatch

    def pred_x0(self, sample: torch.Tensor, model_output: torch.Tensor, timestep: Any) -> Any:
        if self._pag_fast.session is None:
            return super().pred_x0(sample, model_output, timestep)  # type: ignore[misc]
        return Predicted(sample, model_output)

    def pred_epsilon(self, sample: torch.Tensor, model_output: torch.Tensor, timestep: Any) -> Any:
        if self._pag_fast.session is None:
            return super().pred_epsilon(sample, model_output, timestep)  # type: ignore[misc]
        return Predicted(sample, model_output)

    def sag_masking(
        self, original_latents: Any, attn_map: Any, map_size: Any, t: Any, eps: Any
    ) -> torch.Tensor:
        session = self._pag_fast.session
        if session is None or not isinstance(original_latents, Predicted):
            return super().sag_masking(original_latents, attn_map, map_size, t, eps)  # type: ignore[misc]
        return session.degrade(*original_latents, attn_map, map_size, t)

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        prepare = super().prepare_ip_adapter_image_embeds  # type: ignore[misc]
        embeds, session = prepare(*args, **kwargs), self._pag_fast.session
        if session is not None:
            arguments = inspect.signature(prepare).bind(*args, **kwargs).arguments
            session.keep_images(embeds, arguments["do_classifier_free_guidance"])
        return embeds
