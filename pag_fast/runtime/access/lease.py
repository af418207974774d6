"""One user of a model at a time: who has it, who waits, and what is taken off for whom."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from torch import nn

from ...models.registry import uncompiled
from .frames import running_pipeline
from .instance_patch import InstancePatch

PATIENCE = 60.0
"""Seconds that a forward waits for the model while nothing moves on."""

Run = Callable[..., Any]

# torch.compile(model) is a module of its own, which runs the very modules of the model
_LEASES: WeakKeyDictionary[nn.Module, ref[Lease]] = WeakKeyDictionary()


class Named(Protocol):
    """Somebody who may have a model."""

    @property
    def owner(self) -> str:
        """Who it is, in words, for errors."""


Owner = str | Named
"""Who has a model: in words, or somebody who can say it."""


class Lease:
    """One user at a time: forwards that change a model exclude each other, and wait for the others.

    A forward of the same thread in the middle of another one does not wait: the changes of the
    outer one are taken off for it.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._holder = 0
        self._owner: Owner = ""
        # what each forward of the holder has put on, innermost last; None: nothing yet
        self._held: list[tuple[InstancePatch, list[Any]] | None] = []
        self._passing: Counter[int] = Counter()
        # threads that want the model for themselves: forwards that overlap without end let them in
        self._wanted: Counter[int] = Counter()
        self._waiting = 0
        self._progress = 0

    @staticmethod
    def of(model: nn.Module) -> Lease:
        """The lease of a model: that of what ``torch.compile`` has wrapped, if it has."""
        inner = uncompiled(model)
        made = _LEASES.get(inner)
        found = None if made is None else made()
        if found is None:
            found = Lease()
            _LEASES[inner] = ref(found)
        return found

    # plain methods, as context managers would cost several calls in every forward

    def take(self, owner: Owner) -> Owner:
        """The model is this thread's, as it is without us; returns what :meth:`give` needs."""
        me = get_ident()
        with self._lock:
            if self._holder not in (0, me) or (self._passing and self._others_pass(me)):
                self._await(owner, me)
            before = self._owner
            self._holder, self._owner = me, owner
        if self._held:
            self._suspend()
        self._held.append(None)
        return before

    def give(self, before: Owner) -> None:
        """The opposite of :meth:`take`."""
        self._held.pop()
        if self._held:
            self._resume()
        with self._lock:
            self._owner = before
            if not self._held:
                self._holder = 0
            self._progress += 1
            if self._waiting:
                self._changed.notify_all()

    def run(self, patch: InstancePatch, forward: Run, args: Any, kwargs: Any) -> Any:
        """A forward with ``patch`` on the model, which this thread has taken."""
        self._held[-1] = patch, patch.on()
        try:
            return forward(*args, **kwargs)
        finally:
            self._take_off()

    @contextmanager
    def hold(self, owner: Owner, make: Callable[[], InstancePatch]) -> Iterator[None]:
        """The model for this thread alone, with what ``make`` returns on it."""
        before = self.take(owner)
        try:
            patch = make()
            if not patch.entries:
                yield
                return
            self._held[-1] = patch, patch.on()
            try:
                yield
            finally:
                self._take_off()
        finally:
            self.give(before)

    def _take_off(self) -> None:
        worn = self._held[-1]
        if worn is not None:
            worn[0].off(worn[1])
            self._held[-1] = None

    @contextmanager
    def share(self) -> Iterator[None]:
        """The model as it is without us."""
        me = get_ident()
        with self._lock:
            if not self._admits(me):
                self._wait("", lambda: self._admits(me))
            self._passing[me] += 1
        mine = self._holder == me
        if mine:
            self._suspend()
            self._held.append(None)
        try:
            yield
        finally:
            if mine:
                self._held.pop()
                self._resume()
            with self._lock:
                self._passing -= Counter((me,))
                self._progress += 1
                if self._waiting:
                    self._changed.notify_all()

    def _suspend(self) -> None:
        """What an outer forward of this thread has put on is off meanwhile."""
        if self._held and self._held[-1] is not None:
            patch, before = self._held[-1]
            patch.off(before)

    def _resume(self) -> None:
        if self._held and self._held[-1] is not None:
            patch, _ = self._held[-1]
            self._held[-1] = patch, patch.on()

    def _others_pass(self, me: int) -> bool:
        return any(thread != me for thread in self._passing)

    def _admits(self, me: int) -> bool:
        """Whether a stock forward may begin; one inside of another of its thread has to."""
        if self._holder:
            return self._holder == me
        return me in self._passing or not self._wanted

    def _user(self) -> str:
        """Who runs the model, in words."""
        if self._holder:
            return _in_words(self._owner)
        me = get_ident()
        names = [running_pipeline(thread) for thread in self._passing if thread != me]
        return next(filter(None, names), "another thread")

    def _await(self, owner: Owner, me: int) -> None:
        """Wait until the model is free or this thread's."""
        self._wanted[me] += 1
        try:
            self._wait(owner, lambda: self._holder in (0, me) and not self._others_pass(me))
        finally:
            self._wanted -= Counter((me,))
            self._changed.notify_all()

    def _wait(self, owner: Owner, free: Callable[[], bool]) -> None:
        seen, since = self._progress, time.monotonic()
        self._waiting += 1
        try:
            while not free():
                self._changed.wait(min(1.0, PATIENCE))
                if self._progress != seen:
                    seen, since = self._progress, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    raise ValueError(
                        f"{_in_words(owner)} has waited {PATIENCE:g} s for a model that "
                        f"{self._user()} is running: two pipelines that share a model may run in "
                        "turns, but neither from another thread inside of a forward of the other. "
                        "Give each a model of its own."
                    )
        finally:
            self._waiting -= 1


def _in_words(owner: Owner) -> str:
    if isinstance(owner, str):
        return owner or running_pipeline(get_ident()) or "A forward outside of pipelines"
    return owner.owner
