"""The lasting part of a patch: what is kept on a pipeline from one call to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

from ..config import PatchConfig, check_scale
from ..fusion import Lean
from ..pipelines.injected import Host, denoiser_names
from ..sharing.plan import is_compiled
from .compilation import Compilation, enough_graphs
from .fallbacks import Falls
from .injected import HostedSession, Loop
from .installation import Installation
from .session import Session


class Patch(Falls):
    """The lasting part of a patch: settings, what calls have run, and what can be reused."""

    def __init__(
        self,
        config: PatchConfig,
        original_class: type,
        original_layers: Any,
        own_layers: Any,
        host: Host | None = None,
    ) -> None:
        super().__init__(config)
        self.original_class = original_class
        self.original_layers = original_layers
        self.own_layers = own_layers
        self.host = host
        # of a pipeline without PAG: what is perturbed, and PAG's scales, in the latest call
        self.layers: list[str | int] = [] if own_layers is None else own_layers
        self.pag_scale = 3.0 if config.pag_scale is None else float(config.pag_scale)
        self.pag_adaptive_scale = float(config.pag_adaptive_scale or 0.0)
        # rebuilt only when layers or modules change: a compiled denoiser guards on these objects
        self._installed: dict[int, tuple[Any, Installation]] = {}
        self._leans: dict[int, tuple[Any, Lean]] = {}
        self.compilation: Compilation | None = None

    def inherit(self, before: Patch) -> None:
        """Take over what ``before`` has made, if it is what these settings would make.

        Compiled graphs guard on it: with new processors and hooks they would be compiled again.
        """
        if self.config.installed == before.config.installed:
            self._installed, before._installed = before._installed, {}
            self._leans, before._leans = before._leans, {}
            self.compilation, before.compilation = before.compilation, None

    def call(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``call``, the pipeline's own ``__call__``, inside a session."""
        self.check_idle()
        self.compile(pipe)
        if self.compilation is not None:
            self.compilation.check_compiler(pipe.device.type)
        watched = any(kwargs.get(k) for k in ("callback_on_step_end", "callback"))
        regional = self.compilation is not None and self.compilation.config.regional
        sessions: list[Session] = []
        try:
            with ExitStack() as stack:
                for session in self._sessions(pipe, watched, call, args, kwargs):
                    sessions.append(session)
                    self.session = sessions[0]
                    stack.callback(session.end)
                    session.open()
                with enough_graphs() if regional else nullcontext():
                    result = call(*args, **kwargs)
                if not sessions[0].freed:
                    pipe.maybe_free_model_hooks()
        finally:
            self.session = None
        # pipelines that return latents early forget return_dict
        early = not kwargs.get("return_dict", True) and not isinstance(result, tuple)
        return result.to_tuple() if early else result

    def _sessions(
        self,
        pipe: Any,
        watched: bool,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[Session]:
        """A session for every denoiser."""
        if self.host is None:
            yield Session(pipe, self, watched)
            return
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        loop = Loop()
        for name in denoiser_names(pipe):
            yield HostedSession(pipe, self, watched, name, self.host, bound.arguments, loop)

    def call_host(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """:meth:`call` for a pipeline without PAG, whose own call takes no scales of PAG."""
        before = self.pag_scale, self.pag_adaptive_scale
        for name in ("pag_scale", "pag_adaptive_scale"):
            value = check_scale(name, kwargs.pop(name, None))
            if value is not None:
                setattr(self, name, value)
        try:
            if self.pag_scale == 0.0:
                return call(*args, **kwargs)
            return self.call(pipe, call, args, kwargs)
        finally:
            self.pag_scale, self.pag_adaptive_scale = before

    def installation(self, denoiser: Any, layers: Any, *, eager: bool) -> Installation:
        """The plan, processors and hooks for ``denoiser``, made anew when something changed."""
        key = (tuple(layers), eager, _modules(denoiser))
        found = self._installed.get(id(denoiser))
        if found is None or found[0] != key:
            if found is not None and found[1].lean is not None:
                found[1].lean.release()
            found = key, Installation(denoiser, layers, self.config, eager=eager)
            self._installed[id(denoiser)] = found
        return found[1]

    def lean(self, controlnet: Any) -> Lean:
        """What can be left out in a ControlNet, found anew when something changed."""
        key = _modules(controlnet)
        found = self._leans.get(id(controlnet))
        if found is None or found[0] != key:
            if found is not None:
                found[1].release()
            lean = Lean(controlnet, traced=self.config.traces)
            self._leans[id(controlnet)] = found = key, lean
        return found[1]

    def compile(self, pipe: Any) -> None:
        """Compile the models that the pipeline has, where that is wanted and not done.

        Raises:
            ValueError: a model that cannot be compiled; nothing is, then.
        """
        wanted, made = self.config.compilation, self.compilation
        if made is not None and not made.covers(pipe):
            made.undo()
            self.compilation = None
        if wanted is not None and self.compilation is None:
            self.compilation = Compilation(pipe, wanted)

    def release(self) -> None:
        """Leave the models as they were found."""
        if self.compilation is not None:
            self.compilation.undo()
            self.compilation = None
        for _, installed in self._installed.values():
            if installed.lean is not None:
                installed.lean.release()
        for _, lean in self._leans.values():
            lean.release()


def _modules(model: Any) -> list[tuple[int, bool]]:
    return [(id(m), is_compiled(m)) for m in model.modules()]
