"""One call of a patched ``StableDiffusionSAGPipeline``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..models.registry import has_compiled, uncompiled
from ..ops import reference
from ..runtime.access.entry import Entry
from ..runtime.access.forwards import Forward
from ..runtime.access.frames import calling_frame, diffusers_class, loop_of, nobody_writes
from ..runtime.access.instance_patch import InstancePatch, as_put_on
from ..runtime.compatibility.findings import Findings
from ..sharing.arguments import latents_of
from ..sharing.plan import is_compiled
from ..sharing.row_equality import RowEquality
from .attention import QueriesAndKeys, received_from_map
from .schedule import NoiseSchedule
from .shared import SharedPasses

if TYPE_CHECKING:
    from .patch import SagPatch


class SagSession:
    """The state of one running call.

    The pipeline puts its own processor onto the middle self-attention. Each forward of the UNet has
    ours in its place, and on every way out of the call the pipeline's own is taken off, too.

    Attributes:
        images: the IP-Adapter's embeddings of uncond and cond, as they were prepared.
        awaited: the degraded latents that the UNet has not been called with yet.
    """

    def __init__(self, pipe: Any, patch: SagPatch) -> None:
        self.pipe = pipe
        self.patch = patch
        self.owner = f"{type(pipe).__name__} (patched)"
        self.images: list[torch.Tensor] | None = None
        self.awaited: torch.Tensor | None = None
        self._is_degraded = False
        self._schedule = NoiseSchedule(pipe)
        self._loop_code = loop_of(diffusers_class(pipe))
        self._equality = RowEquality(nobody_writes)
        self._degrades = False
        self._blur: torch.Tensor | None = None
        self._steps = 0
        self._running_forward = False
        unet = pipe.unet
        self._model: Any = uncompiled(unet)
        self._attention = self._model.mid_block.attentions[0].transformer_blocks[0].attn1
        self._original = self._attention.processor
        self.compiled = has_compiled(unet) or is_compiled(self._model)
        self._shared: SharedPasses | None = None

    # ---- the life of the call ----

    def start(self) -> None:
        """The pipeline's call begins."""
        if self.compiled:
            self.patch.fall_back("the UNet is compiled: it runs as it is, and stores its map")
            return
        # dropout is new in every pass
        keeps = self.patch.config.cache_conditioning and not self._model.training
        self._shared = SharedPasses(self._model, self.patch.step, keeps=keeps)

    def end(self) -> None:
        """The call is over: nothing of the pipeline's own is left behind, either."""
        # somebody may have set another processor meanwhile: then it stays
        if _stores_map(self._attention.processor):
            self._attention.set_processor(self._original)
        if self._shared is not None:
            self._shared.forget()

    def check(self, entry: Entry) -> None:
        """The pipeline has returned its result by itself: tell of what went wrong meanwhile.

        Raises:
            ValueError: with ``strict=True``.
        """
        if self._shared is None:
            return
        self.patch.tell_of_changes(self._shared.kept)
        wanted = len(self.pipe.scheduler.timesteps)
        whole = self._steps >= wanted and self.awaited is None
        if whole or getattr(self.pipe, "_interrupt", False):
            return
        if self.pipe.unet is not entry.model or not entry.is_in_front:
            self.patch.fall_back(
                "the unet was compiled or replaced during the call: what ran since then ran as "
                "stock does. Do so between two calls"
            )
        else:
            self.patch.fall_back(
                f"{self._steps} of {wanted} guided passes were seen in this call, or a degraded "
                "one was not: something else ran the unet, as stock does"
            )

    # ---- a forward ----

    def owns(self) -> bool:
        """Whether the forward that begins is one of this call's denoising loop."""
        # what a hook in the middle of our forward runs is nobody's
        if self._shared is None or self._running_forward:
            return False
        return calling_frame(self._loop_code)[0] is self.pipe

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A guided or a degraded pass, from its arguments to its output."""
        shared = self._shared
        assert shared is not None
        forward = Forward(entry, self._model, args, kwargs)
        found = self.patch.look(self._model)
        found.refuse()
        if found.stock_pag:
            raise ValueError(
                "A PAG pipeline that shares this UNet has put its processors there: it is running, "
                "in another thread or around this call, or an error has ended it. Run one after "
                "the other, or call set_attn_processor() if it is over."
            )
        self._running_forward = True
        try:
            call = self._enter(forward.call, shared, found)
            out = forward.run(lambda: self._patch(found), shared.states, call)
            self._leave(shared)
        finally:
            self._running_forward = False
        return out

    def _patch(self, found: Findings) -> InstancePatch:
        """What is put on the UNet for a forward."""
        assert self._shared is not None
        entries = self._shared.entries
        if _stores_map(self._attention.processor):
            # the pipeline has put its own there, which stores the map
            entries = [(vars(self._attention), "processor", self.patch.processor), *entries]
        fuses = self.patch.config.fewer_launches and not self._model.training
        if fuses and not found.weights_apart:
            fusion = self.patch.fusion(self._model)
            # products are fused for the processors that are going to run
            with as_put_on(InstancePatch(entries)):
                fusion.refresh()
            if not self._is_degraded:
                fusion.forget()  # the degraded pass goes on with what the guided one has projected
            entries = [*entries, *fusion.entries]
        return InstancePatch(entries)

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

    def _enter(self, call: dict[str, Any], shared: SharedPasses, found: Findings) -> dict[str, Any]:
        latents, timestep = latents_of(call), call["timestep"]
        keeps = not found.nothing_kept
        self._is_degraded = latents is self.awaited
        if self._is_degraded:
            self.awaited = None
            leads = keeps and self._equality.leads(call)
            shared.degraded(latents, timestep, leads=leads)
            return call
        self._steps += 1
        call = self._with_all_images(call, latents.shape[0])
        same = keeps and self._equality.same_objects(call, latents.shape[0])
        shared.guided(latents, timestep, same=same)
        return call

    def _with_all_images(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        """The pipeline hands the IP-Adapter the images of cond alone, for uncond and cond."""
        added = call.get("added_cond_kwargs")
        if self.images is None or not added or added["image_embeds"][0].shape[0] == rows:
            return call
        return {**call, "added_cond_kwargs": {**added, "image_embeds": self.images}}

    def _leave(self, shared: SharedPasses) -> None:
        seen = self.patch.processor.take()
        degraded, store = self._is_degraded, self._attention.processor
        if not degraded and _stores_map(store):
            store.attention_probs = seen
        self.patch.steps["degraded passes" if degraded else "guided passes"] += 1
        # what follows the last pass, decoding, is where memory runs short
        last = self._steps == len(self.pipe.scheduler.timesteps)
        if last and (degraded or not self._degrades):
            shared.forget()

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
        self._degrades = True
        self.awaited = ops.degrade_latents(
            sample,
            model_output,
            received,
            self._blur,
            map_size=(int(map_size[0]), int(map_size[1])),
            clean=clean,
            noise=noise,
            backend=backend,
        )
        return self.awaited


def _stores_map(processor: Any) -> bool:
    return type(processor).__name__ == "CrossAttnStoreProcessor"
