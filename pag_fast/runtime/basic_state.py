"""What every kind of patch has: counters, fallbacks, and a place in front of its models."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from ..config import PatchConfig
from ..models.registry import uncompiled
from ..pipelines.description import PipelineDescription
from ..sharing.conditioning_cache import ConditioningCache
from .access.entry import Entry
from .access.frames import calling_pipeline
from .compatibility import Compatibility, own_package
from .compatibility.findings import Findings
from .undoing import undo_all


class Doorkeeper:
    """The claim of one patch on one model: it is asked about every call, and knows the session.

    Args:
        part: the pipeline's attribute that holds the model.
        asked: off for the nets of a ``MultiControlNetModel``, which are entered through it.
    """

    def __init__(self, state: BasicState, part: str, *, asked: bool = True) -> None:
        # the entry holds this object, and a pipeline that nobody has any more is to be let go
        self._state = weakref.ref(state)
        self.part = part
        self.asked = asked

    @property
    def owner(self) -> str:
        return self._running().owner

    def _running(self) -> Any:
        state = self._state()
        return None if state is None else state.running.get(self.part)

    def owns(self) -> bool:
        running = self._running() if self.asked else None
        if running is None:
            state = self._state() if self.asked else None
            if state is not None:
                state.look_for_bypass()
            return False
        return bool(running.owns())

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._running().forward(entry, args, kwargs)


class BasicState:
    """What every kind of patch has: counters, fallbacks, and a place in front of its models.

    Attributes:
        host: the description of a pipeline without PAG; ``None`` for the others.
        session: the running call, if any.
        running: what takes the forwards of each part of the pipeline while a call runs.
        steps: forwards of the denoiser so far, by how they ran.
        fallbacks: reasons why something ran otherwise than it should, and how often.
    """

    host: PipelineDescription | None = None
    original_class: type

    def __init__(self, config: PatchConfig) -> None:
        self.config = config
        self.session: Any = None
        self._call = Lock()
        self._behind: int | None = None  # the thread in which a wrapper of the call runs
        self.running: dict[str, Any] = {}
        self.steps: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self._entries: dict[str, list[tuple[Entry, Doorkeeper]]] = {}
        weakref.finalize(self, _leave_all, self._entries).atexit = False
        self._compatibility: WeakKeyDictionary[Any, Compatibility] = WeakKeyDictionary()
        self._found = Findings()

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """The time of one call. Raises ValueError while another one runs."""
        if not self._call.acquire(blocking=False):
            raise ValueError(
                "This pipeline is already running: a patched pipeline cannot be called from its "
                "own callback or from a second thread."
            )
        try:
            yield
        finally:
            self._call.release()

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """While somebody's wrapper of the pipeline's call runs, which may come back to ours."""
        self._behind = get_ident()
        try:
            yield
        finally:
            self._behind = None

    def passes_on(self) -> bool:
        """Whether a call is the one that a wrapper hands on, asked once."""
        if self._behind != get_ident():
            return False
        self._behind = None
        return True

    def look_for_bypass(self) -> None:
        """Tell of a call that has gone past ours: PAG is in no other.

        Raises:
            ValueError: with ``strict=True``.
        """
        # a PAG pipeline guides by itself, and a call of scale 0 has no session
        if self.host is None or self.host.kind != "injected" or self._call.locked():
            return
        pipe = calling_pipeline()
        if getattr(pipe, "_pag_fast", None) is self:
            self.fall_back(
                f"{type(pipe).__name__}.__call__ was called past the patched pipeline's own, and "
                "has no PAG: call pipe(...), or type(pipe).__call__.__wrapped__(pipe, ...) with "
                "gradients"
            )

    def check_idle(self, what: str) -> None:
        """Raises ValueError for something that cannot be done while a call runs."""
        if self._call.locked():
            raise ValueError(
                f"This pipeline is running and cannot be {what} now: do that before or after its "
                "call, not in a callback or from another thread."
            )

    @contextmanager
    def alone(self, part: str, owner: str) -> Iterator[None]:
        """The model of a part for this thread alone, for a look at it as it is without us."""
        with self._entries[part][0][0].alone(owner):
            yield

    def fall_back(self, reason: str) -> None:
        """Count a fallback; warn the first time, raise if strict."""
        if self.config.strict:
            raise ValueError(f"{reason} (strict=True)")
        if reason not in self.fallbacks:
            warnings.warn(f"pag_fast: {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def tell_of_changes(self, *caches: ConditioningCache | None) -> None:
        """At the end of a call: tell of what has changed without a trace while it ran.

        Raises:
            ValueError: with ``strict=True``.
        """
        seen = [cache.checks.differing() for cache in caches if cache is not None]
        names = [name for found in seen for name in found]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.fall_back(
                f"weights of {names[0]}{more}, or the conditioning that goes in there, were "
                "written through .data in the middle of the call, by NumPy, or in an object of "
                "one's own, which leaves no trace: steps that followed ran with what was computed "
                "from the former ones. Write into the tensors themselves, under torch.no_grad(), "
                "keep them as attributes of modules, or patch with cache_conditioning=False"
            )

    def look(self, model: Any) -> Findings:
        """What others have put on a model, now."""
        found = self._compatibility.get(model)
        if found is None:
            apart = self.host is not None and self.host.sequential
            own = own_package(model)
            found = self._compatibility[model] = Compatibility(passes_apart=apart, own=own)
        items = found.look(model)
        if items is not self._found.items:
            self._found = Findings(items)
        return self._found

    def enter(self, pipe: Any, part: str) -> None:
        """Stand in front of the model that ``pipe`` has now, and no longer of one it had."""
        model = getattr(pipe, part)
        wanted = models_of(model)
        held = self._entries.get(part, [])
        if [id(entry.model) for entry, _ in held] != [id(m) for m in wanted]:
            self.leave(part)
            held = [(Entry.of(m), Doorkeeper(self, part, asked=m is model)) for m in wanted]
            self._entries[part] = held
        for entry, keeper in held:
            entry.add(keeper)
        held[0][0].inner = [entry for entry, _ in held[1:]]
        for compatibility in self._compatibility.values():
            compatibility.begin()

    def leave(self, part: str) -> None:
        """Stand in front of the model no longer."""
        for entry, keeper in self._entries.pop(part, []):
            entry.remove(keeper)

    def release(self) -> None:
        """Leave the models as they were found."""
        undo_all(*[partial(self.leave, part) for part in tuple(self._entries)])


def models_of(part: Any) -> list[Any]:
    """A model of a pipeline and, of a ``MultiControlNetModel``, its nets."""
    return [part, *getattr(uncompiled(part), "nets", ())]


def _leave_all(entries: dict[str, list[tuple[Entry, Doorkeeper]]]) -> None:
    """A patched pipeline is gone without having been unpatched: its models are nobody's again."""
    for held in entries.values():
        for entry, keeper in held:
            entry.remove(keeper)
