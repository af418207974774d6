"""What stays on a patched pipeline from one call to the next, and how a call begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from ..config import PatchConfig, check_scale
from ..fusion import Fusion
from ..models.registry import controlnets, fusable_processors, uncompiled
from ..models.traced.description import seen_of
from ..pipelines.description import PipelineDescription
from ..pipelines.registry import denoiser_names
from ..settings.layers import as_list
from ..sharing.conditioning_cache import Invariant
from ..sharing.plan import modules_of
from ..sharing.rows import BranchState
from .access.frames import know_loops
from .basic_state import BasicState, models_of
from .compiled.capture import Capture, capture_on
from .compiled.compilation import Compilation, enough_graphs, refuse_values
from .compiled.graphs import Graphs
from .compiled.retained import leave_behind, take_over
from .controlnets import InstalledControlNets
from .guidance import own_number_of_steps, steps_of_call
from .injected import InjectedSession
from .installation import Installation
from .loops.loop import Loop
from .observed_session import session_of
from .perturbed_branches import perturbed_branches
from .ranks.on_ranks import InjectedOnRanks, OnRanks, agree
from .session import Session
from .stock_patch import run_stock
from .undoing import free_models, undo_after_error, undo_all

_SCALES = ("pag_scale", "pag_adaptive_scale")
# of installations for different layers, as calls that name layers take turns
_MOST_INSTALLATIONS = 8


class PatchState(BasicState):
    """The lasting part of a patch: settings, what calls have run, and what can be reused."""

    def __init__(
        self,
        config: PatchConfig,
        original_class: type,
        original_layers: Any,
        own_layers: Any,
        host: PipelineDescription | None = None,
    ) -> None:
        super().__init__(config)
        self.original_class = original_class
        know_loops(original_class)
        self.original_layers = original_layers
        self.own_layers = own_layers
        self.host = host
        # of a pipeline without PAG: what is perturbed, and PAG's scales, in the latest call
        self.layers: list[str | int] = [] if own_layers is None else own_layers
        self.pag_scale = 3.0 if config.pag_scale is None else float(config.pag_scale)
        self.pag_adaptive_scale = float(config.pag_adaptive_scale or 0.0)
        # made anew only when layers or modules change: a compiled denoiser guards on these objects
        self._installed: dict[Any, tuple[Any, Installation]] = {}
        self._fusions: dict[int, tuple[Any, Fusion]] = {}
        self._controlnets: tuple[Any, InstalledControlNets] | None = None
        self.compilation: Compilation | None = None
        # what records forwards, made in the first call that wants it
        self.make_capture: Callable[[Any], Capture] = capture_on
        self.capture: Capture | None = None
        # what the latest call has shown of a loop that nobody has described
        self.seen_of_loop: dict[str, str] = {}
        # what is perturbed behind a running call that has named layers for itself
        self.lasting_layers: Any = None

    @property
    def described(self) -> type:
        """The class, among those the pipeline inherits from, that is described."""
        assert self.host is not None
        return next(c for c in self.original_class.__mro__ if c.__name__ == self.host.name)

    def inherit(self, before: PatchState) -> None:
        """Take over what ``before`` has made, if it is what these settings would make.

        Compiled graphs guard on it: with new processors and forwards they would be compiled again.
        """
        if self.config.installed == before.config.installed:
            self._installed, before._installed = before._installed, {}
            self._fusions, before._fusions = before._fusions, {}
            self.compilation, before.compilation = before.compilation, None

    def recall(self, pipe: Any) -> None:
        """Take over what earlier patches with these settings have left with compiled models."""
        take_over(self, [m for part in self.parts(pipe) for m in models_of(getattr(pipe, part))])

    def parts(self, pipe: Any) -> list[str]:
        """The attributes of the pipeline that hold models we stand in front of."""
        names = list(denoiser_names(pipe))
        return names + ["controlnet"] * (getattr(pipe, "controlnet", None) is not None)

    def enter_models(self, pipe: Any) -> None:
        """Stand in front of every model that the pipeline has now."""
        parts = self.parts(pipe)
        for part in set(self._entries) - set(parts):
            self.leave(part)
        for part in parts:
            self.enter(pipe, part)
        self._let_go([uncompiled(getattr(pipe, part)) for part in parts])

    def _let_go(self, models: list[Any]) -> None:
        """Keep nothing of models that the pipeline has no more: their weights are theirs again."""
        nets = [net for model in models for net in controlnets(model)]
        gone = [key for key in self._installed if key[0] not in map(id, models)]
        undo = [self._installed.pop(key)[1].release for key in gone]
        lost = [key for key in self._fusions if key not in map(id, nets)]
        undo += [self._fusions.pop(key)[1].release for key in lost]
        undo_all(*undo)

    # ---- a call ----

    def call(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``call``, the pipeline's own ``__call__``, inside a session.

        Takes ``pag_applied_layers`` for this call alone, and for a pipeline that has no PAG of its
        own ``pag_scale`` and ``pag_adaptive_scale``.
        """
        with self.one_call():
            return self._call_with(pipe, call, args, kwargs)

    def _call_with(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call with the scales and layers that it names, which are the patch's afterwards."""
        named = kwargs.pop("pag_applied_layers", None)
        wanted = None if named is None else self.checked_layers(pipe, named)
        before = {name: getattr(self, name) for name in _SCALES}
        layers = self._set_layers(pipe, wanted)
        self.lasting_layers = layers
        try:
            for name in _SCALES:
                value = check_scale(name, kwargs.get(name))
                if self.host is not None:
                    kwargs.pop(name, None)
                if value is not None:
                    (kwargs if self.host is None else vars(self))[name] = value
            if self.config.mesh is not None:
                agree(pipe, self, args, kwargs)
            if self.host is not None and self.pag_scale == 0.0:
                return self._run_without(pipe, call, args, kwargs)
            with own_number_of_steps(pipe):
                return self._run(pipe, call, args, kwargs)
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            now = self.layers if self.host is not None else pipe.pag_applied_layers
            # a callback may have chosen others, for the calls that follow
            if now is wanted:
                self._set_layers(pipe, layers)
            self.lasting_layers = None

    def _run_without(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call without PAG: what the pipeline guides by itself is resumed all the same."""
        guidance = None if self.host is None else self.host.stock_guidance
        if guidance is None or not self.config.share_branches:
            return call(*args, **kwargs)
        self.enter_models(pipe)
        return run_stock(pipe, self, guidance, call, args, kwargs)

    def checked_layers(self, pipe: Any, layers: Any) -> list[str | int]:
        """Layers that somebody has named since patching, as a list.

        Raises:
            ValueError: a layer that no denoiser has, or a patch whose branches have their own.
        """
        if self.config.branches is not None:
            raise ValueError(
                "This pipeline was patched with branches, each of which has layers of its own: "
                "patch it again to change them."
            )
        wanted = as_list(layers)
        for name in denoiser_names(pipe):
            perturbed_branches(uncompiled(getattr(pipe, name)), wanted, self.config)
        return wanted

    def _set_layers(self, pipe: Any, layers: Any) -> Any:
        """Perturb ``layers`` from here on, unless ``None``; returns what puts the former back."""
        if layers is None:
            return None
        if self.host is not None:
            before, self.layers = self.layers, layers
        else:
            before, pipe.pag_applied_layers = pipe.pag_applied_layers, layers
        return before

    def _run(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.compile(pipe)
        if self.compilation is not None:
            self.compilation.check_compiler(pipe.device.type)
        self.enter_models(pipe)
        if self.capture is not None:
            self.capture.bytes = 0
        regional = self.compilation is not None and self.compilation.config.regional
        sessions: list[Session] = []
        try:
            for session in self._sessions(pipe):
                sessions.append(session)
                self.session = sessions[0]
                self.running[session.denoiser] = session
            self.running["controlnet"] = sessions[0].controlnets
            for session in sessions:
                if isinstance(session, InjectedSession):
                    session.start()
            many = enough_graphs() if regional else nullcontext()
            with many:
                result = call(*args, **kwargs)
                self._check_entered(pipe, sessions)
            if not sessions[0].freed:
                free_models(pipe)
        except BaseException:
            self.session, self.running = None, {}
            undo_after_error(*[partial(x.end, whole=False) for x in reversed(sessions)])
            raise
        self.session, self.running = None, {}
        undo_all(*[partial(x.end, whole=True) for x in reversed(sessions)])
        # pipelines that return latents early forget return_dict; some return no tuple without it
        early = not kwargs.get("return_dict", True) and hasattr(result, "to_tuple")
        return result.to_tuple() if early else result

    def _check_entered(self, pipe: Any, sessions: list[Session]) -> None:
        """Tell of a denoiser that a callback has taken from us, with steps to come.

        Raises:
            ValueError: with ``strict=True``.
        """
        wanted = steps_of_call(pipe)
        if wanted is not None and any(session.steps >= wanted for session in sessions):
            return
        for session in sessions:
            entry = self._entries[session.denoiser][0][0]
            now = getattr(pipe, session.denoiser, None)
            if session.pag and (now is not entry.model or not entry.is_in_front):
                self.fall_back(
                    f"the {session.denoiser} was compiled or replaced during the call: what ran "
                    "since then ran without PAG. Do so between two calls"
                )

    def _sessions(self, pipe: Any) -> Iterator[Session]:
        """A session for every denoiser."""
        ranks = self.config.mesh is not None
        if self.host is None:
            yield OnRanks(pipe, self) if ranks else Session(pipe, self)
            return
        loop = Loop()
        for name in denoiser_names(pipe):
            make = InjectedOnRanks if ranks else session_of
            yield make(pipe, self, name, loop)

    # ---- what is kept between calls ----

    def installation(self, denoiser: Any, layers: Any, *, eager: bool) -> Installation:
        """What is put on ``denoiser`` for these layers, made anew when something changed."""
        key = id(denoiser), tuple(layers), eager, seen_of(denoiser)
        modules = modules_of(denoiser)
        found = self._installed.pop(key, None)
        if found is None or found[0] != modules:
            if found is not None:
                found[1].release()
            found = modules, Installation(denoiser, layers, self.config, eager=eager)
        # the latest is the last: those for layers that no call names any more go first
        self._installed[key] = found
        while len(self._installed) > _MOST_INSTALLATIONS:
            self._installed.pop(next(iter(self._installed)))[1].release()
        return found[1]

    def fusion(self, controlnet: Any, state: BranchState) -> Fusion:
        """What can be joined in a ControlNet, found anew when something changed."""
        key = modules_of(controlnet)
        found = self._fusions.get(id(controlnet))
        if found is None or found[0] != key:
            if found is not None:
                found[1].release()
            known = fusable_processors(controlnet)
            fusion = Fusion(controlnet, traced=self.config.traces, state=state, fusable=known)
            self._fusions[id(controlnet)] = found = key, fusion
        return found[1]

    def fusion_of(self, model: Any) -> Fusion | None:
        """What was joined in a model in the latest call, if it has run."""
        if id(model) in self._fusions:
            return self._fusions[id(model)][1]
        of_model = [x for (key, *_), (_, x) in self._installed.items() if key == id(model)]
        return of_model[-1].fusion if of_model else None

    def graphs(
        self, model: Any, state: BranchState, invariants: Iterable[Invariant], nets: Sequence[Any]
    ) -> Graphs | None:
        """For one call: what records the forwards of a model, of one net or several, if wanted.

        Raises:
            ValueError: the model is on no device that can, or reads values while it runs.
        """
        if not self.config.graphs:
            return None
        refuse_values(uncompiled(model), "captured", "graphs=False")
        if self.capture is None:
            self.capture = self.make_capture(next(uncompiled(model).parameters()).device)
        return Graphs(self, self.capture, state, invariants, nets)

    def controlnets(self, controlnet: Any) -> InstalledControlNets:
        """What is put on the ControlNets, made anew when something changed."""
        nets = list(controlnets(controlnet))
        key = [id(controlnet), *(modules_of(net) for net in nets)]
        if self._controlnets is None or self._controlnets[0] != key:
            self._controlnets = key, InstalledControlNets(self, controlnet)
        return self._controlnets[1]

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
        models = [entry.model for held in self._entries.values() for entry, _ in held]
        undo: list[Callable[[], object]] = [super().release]
        if self.compilation is not None:
            undo.append(self.compilation.undo)
        undo += [installed.release for _, installed in self._installed.values()]
        undo += [fusion.release for _, fusion in self._fusions.values()]
        self.compilation = None
        try:
            undo_all(*undo)
        finally:
            leave_behind(self, models)
            self._controlnets = None
