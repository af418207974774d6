"""The way into a model: who is calling, who has to wait, and what runs for whom.

``nn.Module.__call__`` reads the attribute ``_compiled_call_impl`` before anything else, and
pickling drops it. So it is the place where a call can be told apart from the calls of everybody
else: in front of hooks, graphs and offloading, and left on every way out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Condition, get_ident
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..processors.rows import PerturbedProcessor
from .frames import calling_pipeline
from .instance_patch import InstancePatch

NAME, SETTER = "_compiled_call_impl", "set_attn_processor"
PATIENCE = 60.0
"""Seconds that a forward waits for the model while nothing moves on."""

Run = Callable[..., Any]


# the user's module.compile() takes an entry's place, and two for one model would not exclude
# each other
_MADE: WeakKeyDictionary[nn.Module, ref[Entry]] = WeakKeyDictionary()


class Claim(Protocol):
    """Somebody who has put himself in front of a model."""

    @property
    def owner(self) -> str:
        """Who it is, in words, for errors."""

    def owns(self) -> bool:
        """Whether the forward that begins now, in this thread, is his."""

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, with :meth:`Entry.run`."""


class Lease:
    """One user at a time: forwards that change a model exclude each other, and wait for the others.

    A forward of the same thread in the middle of another one does not wait: the changes of the
    outer one are taken off for it.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._holder = 0
        self._owner = ""
        self._held: list[tuple[InstancePatch, list[Any]]] = []
        self._depth = 0
        self._passing: Counter[int] = Counter()
        self._progress = 0

    @contextmanager
    def hold(self, owner: str, make: Callable[[], InstancePatch]) -> Iterator[None]:
        """The model for this thread alone, with what ``make`` returns on it."""
        me = get_ident()
        with self._changed:
            self._wait(owner, lambda: self._holder in (0, me) and not self._others_pass(me))
            self._holder, before, self._owner = me, self._owner, owner
            self._depth += 1
        try:
            with self._suspended():
                patch = make()
                self._held.append((patch, patch.on()))
                try:
                    yield
                finally:
                    patch.off(self._held.pop()[1])
        finally:
            with self._changed:
                self._depth -= 1
                self._owner = before
                if not self._depth:
                    self._holder = 0
                self._moved()

    @contextmanager
    def share(
        self, owner: str = "a forward that pag_fast has nothing to do with"
    ) -> Iterator[None]:
        """The model as it is without us."""
        me = get_ident()
        with self._changed:
            self._wait(owner, lambda: self._holder in (0, me))
            self._passing[me] += 1
        try:
            with self._suspended():
                yield
        finally:
            with self._changed:
                self._passing[me] -= 1
                if not self._passing[me]:
                    del self._passing[me]
                self._moved()

    def held_by_this_thread(self) -> bool:
        return self._holder == get_ident()

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """What an outer forward of this thread has put on is off meanwhile."""
        if self._holder != get_ident() or not self._held:
            yield
            return
        patch, before = self._held[-1]
        patch.off(before)
        try:
            yield
        finally:
            self._held[-1] = patch, patch.on()

    def _others_pass(self, me: int) -> bool:
        return any(thread != me for thread in self._passing)

    def _moved(self) -> None:
        self._progress += 1
        self._changed.notify_all()

    def _wait(self, owner: str, free: Callable[[], bool]) -> None:
        seen, since = self._progress, time.monotonic()
        while not free():
            self._changed.wait(1.0)
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise ValueError(
                    f"{owner} has waited {PATIENCE:g} s for a model that "
                    f"{self._owner or 'another thread'} is running: two pipelines that share a "
                    "model may run in turns, but neither from another thread inside of a forward "
                    "of the other. Give each a model of its own."
                )


class ProcessorSetter:
    """A model's ``set_attn_processor`` while it has an entry: it waits until nobody runs the model.

    PAG pipelines read the processors when a call begins and set them again when it ends. In the
    middle of a forward in another thread they would read ours, and take ours off.
    """

    def __init__(self, model: Any, lease: Lease) -> None:
        self._model = model
        self._lease = lease

    def __call__(self, processor: Any, *args: Any, **kwargs: Any) -> Any:
        set_processors = type(self._model).set_attn_processor
        if self._lease.held_by_this_thread():
            return set_processors(self._model, processor, *args, **kwargs)
        pipe = calling_pipeline()[0]
        patched = " (patched)" if hasattr(pipe, "_pag_fast") else ""
        owner = "set_attn_processor" if pipe is None else f"{type(pipe).__name__}{patched}"
        with self._lease.hold(owner, InstancePatch.nothing):
            if isinstance(processor, dict):
                there = self._model.attn_processors
                processor = {
                    name: there.get(name, own) if isinstance(own, PerturbedProcessor) else own
                    for name, own in processor.items()
                }
            return set_processors(self._model, processor, *args, **kwargs)

    def __reduce__(self) -> Any:
        # a copy of the model has its own method, and no entry
        return getattr, (self._model, SETTER)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo[id(self._model)], SETTER)


class Entry:
    """Stands in front of one model for all patches that have it.

    Attributes:
        displaced: the compiled call that the model's user has put here, if any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.displaced: Run | None = vars(model).get(NAME)
        self.claims: list[Claim] = []
        self.lease = Lease()
        # of a MultiControlNetModel, in front of its nets: its forward changes them, too
        self.inner: list[Entry] = []
        self.inside = 0
        self._own: Run = model._call_impl
        object.__setattr__(model, NAME, self)
        if hasattr(model, SETTER):
            object.__setattr__(model, SETTER, ProcessorSetter(model, self.lease))
        _MADE[model] = ref(self)

    @staticmethod
    def of(model: nn.Module) -> Entry:
        """The entry of a model, put in place where there is none.

        One that is off the model, but that a forward still runs through, is put back.
        """
        made = _MADE.get(model)
        found = None if made is None else made()
        if found is None:
            return Entry(model)
        found.front()
        return found

    def add(self, claim: Claim) -> None:
        """Ask ``claim`` about every call; the latest is asked first."""
        if claim not in self.claims:
            self.claims.insert(0, claim)
        self.front()

    def remove(self, claim: Claim) -> None:
        """Forget ``claim``; with the last one the model is as it was found."""
        if claim in self.claims:
            self.claims.remove(claim)
        if self.claims:
            return
        if isinstance(vars(self.model).get(SETTER), ProcessorSetter):
            object.__delattr__(self.model, SETTER)
        if self.is_in_front:
            if self.displaced is None:
                object.__delattr__(self.model, NAME)
            else:
                object.__setattr__(self.model, NAME, self.displaced)

    def front(self) -> None:
        """Go in front again, where the user has compiled the model since."""
        found = vars(self.model).get(NAME)
        if found is not self:
            self.displaced = found
            object.__setattr__(self.model, NAME, self)

    @property
    def is_in_front(self) -> bool:
        """Whether calls of the model come here; they do not once the user has compiled it."""
        return vars(self.model).get(NAME) is self

    @property
    def below(self) -> Run:
        """What the model runs without us."""
        return self._own if self.displaced is None else self.displaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # somebody traces the model through us
            return self.below(*args, **kwargs)
        if self.inside == get_ident():
            return self.below(*args, **kwargs)
        for claim in tuple(self.claims):
            if claim.owns():
                return claim.forward(self, args, kwargs)
        with self.lease.share():
            return self.below(*args, **kwargs)

    def run(
        self,
        owner: str,
        make: Callable[[], InstancePatch],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One forward with what ``make`` returns on the model, while nobody else runs it."""
        with ExitStack() as stack:
            # in one order for everybody, so that nobody waits for somebody who waits for him
            for entry in sorted(self.inner, key=id):
                stack.enter_context(entry._lent(owner))
            stack.enter_context(self.lease.hold(owner, make))
            return self.below(*args, **kwargs)

    @contextmanager
    def _lent(self, owner: str) -> Iterator[None]:
        """The model is this thread's, as a part of another one that it is entered through."""
        with self.lease.hold(owner, InstancePatch.nothing):
            before, self.inside = self.inside, get_ident()
            try:
                yield
            finally:
                self.inside = before


def check_entry() -> None:
    """Raises ValueError where this version of torch does not read the attribute."""
    probe: Any = nn.Identity()
    object.__setattr__(probe, NAME, lambda x: "seen")
    if probe(None) != "seen":
        raise ValueError(
            f"torch {torch.__version__} calls modules in a way that pag_fast does not know: use a "
            "version of torch that it supports."
        )
