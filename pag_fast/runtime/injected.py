"""A call of a pipeline that knows nothing of PAG: the perturbed branch lives in its denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..models.registry import COND, PERTURBED, UNCOND, family_of, uncompiled
from ..pipelines.injected import Host
from ..sharing.arguments import change_arguments, complete_rows, frames_of, latents_of, version_of
from ..sharing.rows import change_level
from .controlnets import WatchedControlNets
from .guidance import guided_cond, host_timesteps
from .session import Session

if TYPE_CHECKING:
    from .patch_state import Patch


class HostedControlNets(WatchedControlNets):
    """In guess mode these pipelines hand over the cond rows alone."""

    def rows(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        if call.get("guess_mode"):
            self.state.slabs = None
            return call
        return super().rows(call, rows)


@dataclass
class Loop:
    """Where the denoising loop is.

    Attributes:
        step: number of the step, from 0; -1 before the first.
        scales: what has been read of the scheduler (:func:`pag_fast.runtime.guidance.scale_at`).
    """

    step: int = -1
    scales: dict[Any, Any] = field(default_factory=dict)


class HostedSession(Session):
    """As :class:`Session`, for one denoiser of a pipeline without PAG.

    The denoiser's batch is extended by the perturbed rows on the way in, and combined on the way
    out: see :mod:`pag_fast.pipelines.injected`.

    Args:
        arguments: those of the pipeline's call, defaults included.
        loop: shared by the denoisers of a pipeline that has two.
    """

    def __init__(
        self,
        pipe: Any,
        patch: Patch,
        watched: bool,
        denoiser: str,
        host: Host,
        arguments: dict[str, Any],
        loop: Loop,
    ) -> None:
        super().__init__(pipe, patch, watched, denoiser)
        self.controlnets = HostedControlNets(self)
        self.host = host
        self.arguments = arguments
        self.loop = loop
        self._scales = loop.scales
        self._sequence = family_of(uncompiled(getattr(pipe, denoiser))).sequence
        self._context = ""
        self._timestep: Any = None
        self._extended: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._pending: torch.Tensor | None = None

    def open(self) -> None:
        super().open()
        self.begin(self.patch.layers, cfg=True)
        model = uncompiled(getattr(self.pipe, self.denoiser))
        if self.host.sequential and hasattr(model, "cache_context"):
            self._watch_contexts(model)

    def end(self) -> None:
        super().end()
        self._extended, self._pending, self._timestep = {}, None, None

    def _own_rescale(self) -> float:
        return float(self.arguments.get("guidance_rescale") or 0.0)

    def _watch_contexts(self, model: Any) -> None:
        """The pipeline names its passes to the model, for caches: ``"cond"``, then ``"uncond"``."""
        own = model.cache_context

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            self._context = name
            try:
                with own(name, *args, **kwargs):
                    yield
            finally:
                self._context = ""

        model.cache_context = cache_context
        self._undo.append(lambda: vars(model).pop("cache_context", None))

    # ---- a step ----

    def layout(self, rows: int) -> tuple[str, ...]:
        both = not self.host.sequential and self.host.cfg(self.pipe, self.arguments)
        self.unit = rows // 2 if both else rows
        return (UNCOND, COND) if both else (COND,)

    def _is_cond(self, call: dict[str, Any]) -> bool:
        """Whether a call of the denoiser holds cond rows."""
        if call.get("skip_layers") is not None:
            return False  # SD3's skip-layer guidance: a third pass of its own
        if not self.host.sequential:
            return True
        if self._context:
            return not self._context.startswith("uncond")
        # cond comes first, and both get the very timestep
        first = call["timestep"] is not self._timestep
        self._timestep = call["timestep"] if first else None
        return first

    def enter_denoiser(self, call: dict[str, Any]) -> dict[str, Any]:
        """Extend the denoiser's batch by the perturbed rows, where they have a weight."""
        if self._warming:
            return call
        if getattr(self.pipe, "controlnet", None) is None:
            self.begin_step()
        state, sample = self.installed.state, latents_of(call)
        rows, frames = sample.shape[0], frames_of(call)
        cond = self._is_cond(call)
        state.context = COND if cond else UNCOND
        same = self._premise.same_objects(call, rows, context=state.context)
        call = complete_rows(call, rows, frames)
        if self._sequence is not None:
            state.num_contexts, state.num_image = self._sequence(self.installed.denoiser, call)
        if not cond:
            state.slabs, self.ran = None, None
            self.advance(self._kept, call, same)
            return call
        self.loop.step += 1
        layout = self.layout(rows)
        if not same:
            self._decided_for = ()
        scales, branches = self._scales_at(self._scheduled(call)), len(self.installed.branches)
        state.slabs = None
        drops = self._drops(scales, sample)
        if self.patch.compilation is not None or not drops:
            extended = self._extend(call, rows, frames, len(layout), branches)
            everything = layout + (PERTURBED,) * branches
            if self.patch.compilation is not None:
                self._warm(extended, everything, frames, dropped=drops)
            if not drops:
                call, layout = extended, everything
                state.slabs = self._slabs(call, layout, frames, same)
        self.advance(self._kept, call, same)
        self._align_residuals(call, len(layout))
        self.installed.prepare(latents_of(call), self.loop.step)
        self.ran = layout, scales
        return call

    def _scheduled(self, call: dict[str, Any]) -> Any:
        """The scheduler's own timestep: some pipelines hand a function of it to the model."""
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "step_index"):
            return call["timestep"]
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index or 0
        host = host_timesteps(self.pipe, self._scales)
        return host[min(index, len(host) - 1)]

    def _extend(
        self, call: dict[str, Any], rows: int, frames: int, have: int, more: int
    ) -> dict[str, Any]:
        """Every batched argument with copies of its cond rows; the same copies in every step."""
        extended: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

        def extend(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] not in (rows, rows * frames):
                return x
            own, version, copy = self._extended.get(id(x), (None, 0, x))
            unknown = self.watched and x.is_inference()
            if own is not x or version != version_of(x) or unknown:
                copy = change_level(x, have, have + more)
            extended[id(x)] = x, version_of(x), copy
            return copy

        call = change_arguments(call, extend)
        self._extended = extended
        return call

    def _differing(self, everything: dict[str, torch.Tensor], full: int, shared: int) -> list[str]:
        return []  # the perturbed rows are copies

    # ---- the combination ----

    def _leave(self) -> Callable[[Any], Any]:
        after = super()._leave()

        def leave(out: Any) -> Any:
            out = self._combined(out)
            return out if after is None else after(out)

        return leave

    def _combined(self, out: Any) -> Any:
        """The denoiser's output without perturbed rows: their difference is in the others."""
        if self._warming:
            return out
        prediction = out[0]
        if self._is_last_pass():
            self._forget()
        if self.ran is None:
            if self._pending is None:
                return out
            return _with_prediction(out, prediction + self._pending)
        self._pending = None
        uncond, cond, perturbed, scale = self._predictions(prediction)
        if perturbed is None:
            return out
        config = self.patch.config
        cfg = self.host.cfg(self.pipe, self.arguments)
        g = None
        if cfg:
            g = self.host.scale(self.pipe, self.arguments, self.loop.step, self.denoiser)
            if g is None and config.rescale_mode is not None:
                raise ValueError(
                    f"rescale_mode={config.rescale_mode!r} needs the scale of CFG, which this call "
                    "decides on later: use use_dynamic_cfg=False, or no rescale_mode."
                )
        guided = guided_cond(
            uncond,
            cond,
            perturbed,
            g,
            scale,
            rescale=config.rescale or 0.0,
            rescale_mode=config.rescale_mode or "cfg",
            backend=config.backend,
        )
        if cfg and g is None:
            difference = guided - cond
            uncond = None if uncond is None else uncond + difference
            self._pending = difference if self.host.sequential else None
        both = guided if uncond is None else torch.cat([uncond, guided])
        return _with_prediction(out, both.to(prediction.dtype))

    def _is_last_pass(self) -> bool:
        if self.loop.step + 1 != getattr(self.pipe, "_num_timesteps", None):
            return False
        uncond_follows = self.host.sequential and self.host.cfg(self.pipe, self.arguments)
        return self.ran is None or not uncond_follows


def _with_prediction(out: Any, prediction: torch.Tensor) -> Any:
    """A model's output, tuple or dataclass, with another prediction."""
    if isinstance(out, tuple):
        return (prediction, *out[1:])
    return dataclasses.replace(out, sample=prediction)
