"""The lasting part of a patch: what is kept on a pipeline from one call to the next."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .branches.plan import is_compiled
from .compiling import Compilation, enough_graphs
from .config import PatchConfig
from .installation import Installation
from .lean import Lean
from .session import Session


class Patch:
    """The lasting part of a patch: settings, what calls have run, and what can be reused."""

    def __init__(
        self, config: PatchConfig, original_class: type, original_layers: Any, own_layers: Any
    ) -> None:
        self.config = config
        self.original_class = original_class
        self.original_layers = original_layers
        self.own_layers = own_layers
        self.session: Session | None = None
        self.steps: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        # rebuilt only when layers or modules change: a compiled denoiser guards on these objects
        self._installed: tuple[Any, Installation] | None = None
        self._leans: dict[int, tuple[Any, Lean]] = {}
        self.compilation: Compilation | None = None

    def inherit(self, before: Patch) -> None:
        """Take over what ``before`` has made, if it is what these settings would make.

        Compiled graphs guard on it: with new processors and hooks they would be compiled again.
        """
        if self.config.installed == before.config.installed:
            self._installed, before._installed = before._installed, None
            self._leans, before._leans = before._leans, {}
            self.compilation, before.compilation = before.compilation, None

    def call(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``call``, the pipeline's own ``__call__``, inside a session."""
        if self.session is not None:
            raise ValueError(
                "This pipeline is already running: a patched pipeline cannot be called from its "
                "own callback or from a second thread."
            )
        self.compile(pipe)
        if self.compilation is not None:
            self.compilation.check_compiler(pipe.device.type)
        watched = any(kwargs.get(k) for k in ("callback_on_step_end", "callback"))
        self.session = session = Session(pipe, self, watched)
        regional = self.compilation is not None and self.compilation.config.regional
        try:
            session.open()
            with enough_graphs() if regional else nullcontext():
                result = call(*args, **kwargs)
            if not session.freed:
                pipe.maybe_free_model_hooks()
        finally:
            self.session = None
            session.end()
        # pipelines that return latents early forget return_dict
        early = not kwargs.get("return_dict", True) and not isinstance(result, tuple)
        return result.to_tuple() if early else result

    def fall_back(self, reason: str) -> None:
        """Count a fallback; warn the first time, raise if strict."""
        if self.config.strict:
            raise ValueError(f"{reason} (strict=True)")
        if reason not in self.fallbacks:
            warnings.warn(f"pag_fast: {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def installation(self, denoiser: Any, layers: Any, *, eager: bool) -> Installation:
        """The plan, processors and hooks for ``denoiser``, made anew when something changed."""
        key = (tuple(layers), eager, _modules(denoiser))
        if self._installed is None or self._installed[0] != key:
            if self._installed is not None and self._installed[1].lean is not None:
                self._installed[1].lean.release()
            self._installed = key, Installation(denoiser, layers, self.config, eager=eager)
        return self._installed[1]

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
        if self._installed is not None and self._installed[1].lean is not None:
            self._installed[1].lean.release()
        for _, lean in self._leans.values():
            lean.release()


def _modules(model: Any) -> list[tuple[int, bool]]:
    return [(id(m), is_compiled(m)) for m in model.modules()]
