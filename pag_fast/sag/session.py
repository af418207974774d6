"""One call of a patched ``StableDiffusionSAGPipeline``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..fusion import Lean
from ..models.registry import has_compiled, uncompiled
from ..ops import reference
from ..runtime.installation import enter_with
from ..sharing.arguments import latents_of
from ..sharing.plan import is_compiled
from ..sharing.row_equality import Premise
from .attention import QueriesAndKeys, received_from_map
from .schedule import NoiseSchedule
from .shared import SharedPasses

if TYPE_CHECKING:
    from .patch import SagPatch


class SagSession:
    """The state of one running call.

    The pipeline puts its own processor onto the middle self-attention; the session replaces it when
    the UNet is first called, and takes everything off on every way out of the call.

    Attributes:
        images: the IP-Adapter's embeddings of uncond and cond, as they were prepared.
        awaits_degraded: the UNet's next call is the degraded pass.
    """

    def __init__(self, pipe: Any, patch: SagPatch, watched: bool) -> None:
        self.pipe = pipe
        self.patch = patch
        self.watched = watched
        self.images: list[torch.Tensor] | None = None
        self.awaits_degraded = False
        self._undo: list[Callable[[], None]] = []
        self._schedule = NoiseSchedule(pipe)
        self._premise = Premise()
        self._degrades = False
        self._store: Any = None
        self._lean: Lean | None = None
        self._blur: torch.Tensor | None = None
        self._steps = 0

    # ---- installing and removing ----

    def open(self) -> None:
        """Before the pipeline runs: watch its UNet, and remember the processor to put back."""
        unet = self.pipe.unet
        model: Any = uncompiled(unet)
        self._attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
        original = self._attention.processor
        self._undo.append(functools.partial(self._restore_processor, original))
        self.compiled = has_compiled(unet) or is_compiled(model)
        if self.compiled:
            self.patch.fall_back("the UNet is compiled: it runs as it is, and stores its map")
            return
        # dropout is new in every pass
        keeps = self.patch.config.cache_conditioning and not model.training
        self._shared = SharedPasses(model, keeps=keeps)
        self._undo += enter_with(unet, self._enter, lambda out: self._leave())

    def _restore_processor(self, original: Any) -> None:
        # somebody may have set another processor meanwhile: then it stays
        found = self._attention.processor
        if found is self.patch.processor or _stores_map(found):
            self._attention.set_processor(original)

    def _begin(self) -> None:
        """The first pass: the pipeline's processor is in place, and makes way for ours."""
        processor = self._attention.processor
        if _stores_map(processor):
            self._store = processor
            self._attention.processor = self.patch.processor
        self._undo += self._shared.install()
        model = self.pipe.unet
        if self.patch.config.fewer_launches and not model.training:
            self._lean = self.patch.lean(model)
            self._undo += self._lean.install(self._shared.step)

    def end(self) -> None:
        """Take everything off again, in reverse order."""
        while self._undo:
            self._undo.pop()()

    def keep_images(self, embeds: list[torch.Tensor], cfg: bool) -> None:
        """The IP-Adapter's embeddings, of ``[uncond | cond]`` with CFG.

        Raises:
            ValueError: the pipeline would give the wrong rows to a UNet that cannot be watched.
        """
        if self.compiled and cfg:
            raise ValueError(
                "StableDiffusionSAGPipeline hands the images of cond alone to uncond and cond, and "
                "a compiled UNet leaves no place to mend that: run IP-Adapters with a UNet that is "
                "not compiled, or without classifier-free guidance."
            )
        self.images = list(embeds) if cfg else None

    # ---- a step ----

    def _enter(self, call: dict[str, Any]) -> dict[str, Any]:
        if not self._steps:
            self._begin()
        latents, timestep = latents_of(call), call["timestep"]
        if self.awaits_degraded:
            leads = self._premise.leads(call)
            self._shared.degraded(latents, timestep, leads=leads)
            return call
        self._steps += 1
        call = self._with_all_images(call, latents.shape[0])
        same = self._premise.same_objects(call, latents.shape[0])
        self._shared.guided(latents, timestep, same=same, watched=self.watched)
        if self.watched and self._lean is not None:
            self._lean.check()
        return call

    def _with_all_images(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        """The pipeline hands the IP-Adapter the images of cond alone, for uncond and cond."""
        added = call.get("added_cond_kwargs")
        if self.images is None or not added or added["image_embeds"][0].shape[0] == rows:
            return call
        return {**call, "added_cond_kwargs": {**added, "image_embeds": self.images}}

    def _leave(self) -> None:
        seen = self.patch.processor.take()
        degraded, self.awaits_degraded = self.awaits_degraded, False
        if not degraded and self._store is not None:
            self._store.attention_probs = seen
        self.patch.steps["degraded passes" if degraded else "guided passes"] += 1
        # what follows the last pass, decoding, is where memory runs short
        last = self._steps == len(self.pipe.scheduler.timesteps)
        if last and (degraded or not self._degrades):
            self._shared.forget()

    def degrade(
        self,
        sample: torch.Tensor,
        model_output: torch.Tensor,
        attention_map: QueriesAndKeys | torch.Tensor,
        map_size: Any,
        timestep: Any,
    ) -> torch.Tensor:
        """The input of the degraded pass, in place of ``sag_masking``."""
        backend = self.patch.config.backend
        if isinstance(attention_map, torch.Tensor):
            received = received_from_map(attention_map, sample.shape[0])
        else:
            received = attention_map.received(backend)
        clean, noise = self._schedule.weights(timestep)
        if self._blur is None or self._blur.device != sample.device:
            wide = torch.promote_types(sample.dtype, torch.float32)
            self._blur = reference.gaussian_kernel(
                sample.shape[1], device=sample.device, dtype=wide
            )
        self._degrades = self.awaits_degraded = True
        return ops.degrade_latents(
            sample,
            model_output,
            received,
            self._blur,
            map_size=(int(map_size[0]), int(map_size[1])),
            clean=clean,
            noise=noise,
            backend=backend,
        )


def _stores_map(processor: Any) -> bool:
    return type(processor).__name__ == "CrossAttnStoreProcessor"
