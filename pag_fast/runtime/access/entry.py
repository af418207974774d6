"""The way into a model: who is calling, who has to wait, and what runs for whom.

``nn.Module.__call__`` reads the attribute ``_compiled_call_impl`` before anything else, and
pickling drops it. So it is the place where a call can be told apart from the calls of everybody
else: in front of hooks, graphs and offloading, and left on every way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ...models.registry import stock_pag_processors, uncompiled
from ...processors.rows import PerturbedProcessor
from .frames import calling_pipeline
from .instance_patch import InstancePatch
from .lease import Lease, Named, Owner, Run

NAME, SETTER = "_compiled_call_impl", "set_attn_processor"

# the user's module.compile() takes an entry's place, and two for one model would not exclude
# each other
_MADE: WeakKeyDictionary[nn.Module, ref[Entry]] = WeakKeyDictionary()


class Claim(Named, Protocol):
    """Somebody who has put himself in front of a model."""

    def owns(self) -> bool:
        """Whether the forward that begins now, in this thread, is his."""

    def forward(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, with :meth:`Entry.run`; nobody else has the model meanwhile."""


class ProcessorSetter:
    """A model's ``set_attn_processor`` while it has an entry: it waits until nobody runs the model.

    PAG pipelines read the processors when a call begins and set them again when it ends. In the
    middle of a forward in another thread they would read ours, and take ours off. In the middle of
    another PAG pipeline's call they read its processors, and a patched one, which has put none of
    its own there, leaves those alone.
    """

    def __init__(self, model: Any, lease: Lease) -> None:
        self._model = model
        self._lease = lease

    def __call__(self, processor: Any, *args: Any, **kwargs: Any) -> Any:
        set_processors = own_setter(self._model)
        pipe = calling_pipeline()
        patched = " (patched)" if hasattr(pipe, "_pag_fast") else ""
        owner = "set_attn_processor" if pipe is None else f"{type(pipe).__name__}{patched}"
        with self._lease.hold(owner, InstancePatch.nothing):
            if isinstance(processor, dict):
                there, is_patched = self._model.attn_processors, bool(patched)
                processor = {
                    name: _chosen(own, there.get(name, own), is_patched=is_patched)
                    for name, own in processor.items()
                }
            return set_processors(processor, *args, **kwargs)

    def __reduce__(self) -> Any:
        # a copy of the model has its own method, and no entry
        return getattr, (self._model, SETTER)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo[id(self._model)], SETTER)


def _chosen(own: Any, there: Any, *, is_patched: bool) -> Any:
    """The processor that a pipeline's loop means that sets ``own`` in the place of ``there``."""
    stock = stock_pag_processors()
    if isinstance(own, PerturbedProcessor):  # read in the middle of our forward
        return own.displaced if type(there) in stock else there
    return there if is_patched and (type(own) in stock or type(there) in stock) else own


def own_setter(model: Any) -> Run:
    """A model's own ``set_attn_processor``, or that of the model inside of a compiled wrapper."""
    inner = uncompiled(model)
    if inner is not model:
        return inner.set_attn_processor
    return type(model).set_attn_processor.__get__(model)


class Entry:
    """Stands in front of one model for all patches that have it.

    Attributes:
        displaced: the compiled call that the model's user has put here, if any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.displaced: Run | None = vars(model).get(NAME)
        self.claims: list[Claim] = []
        self.lease = Lease.of(model)
        self._wraps = uncompiled(model) is not model
        # of a MultiControlNetModel, in front of its nets: its forward changes them, too
        self.inner: list[Entry] = []
        self.inside = 0
        self._own: Run = model._call_impl
        object.__setattr__(model, NAME, self)
        self._take_setter()
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

    def _take_setter(self) -> None:
        if not hasattr(self.model, SETTER):
            return
        own = vars(self.model).get(SETTER)
        # a copy of a model that had an entry holds the method that it would have without one
        if own is None or (type(own) is MethodType and own == own_setter(self.model)):
            object.__setattr__(self.model, SETTER, ProcessorSetter(self.model, self.lease))

    def front(self) -> None:
        """Go in front again, where the user has compiled the model since."""
        self._take_setter()
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
                if self.inner or self._wraps:
                    with self.alone(claim):
                        return claim.forward(self, args, kwargs)
                before = self.lease.take(claim)
                try:
                    return claim.forward(self, args, kwargs)
                finally:
                    self.lease.give(before)
        with self.lease.share():
            return self.below(*args, **kwargs)

    def _parts(self) -> list[Entry]:
        """Entries that a forward comes through behind this one.

        They are those of nets, and that of what ``torch.compile`` has wrapped, if somebody has one.
        """
        made = _MADE.get(uncompiled(self.model)) if self._wraps else None
        wrapped = None if made is None else made()
        return self.inner if wrapped is None else [*self.inner, wrapped]

    @contextmanager
    def alone(self, owner: Owner) -> Iterator[None]:
        """The model, and what it consists of, for this thread alone and as it is without us.

        Everybody who is going to change the model looks at it in here, too: in the middle of a
        forward of another thread it would be found with things on that are not its own.
        """
        with ExitStack() as stack:
            # in one order for everybody, so that nobody waits for somebody who waits for him:
            # stock forwards enter the whole model first, too
            stack.enter_context(self.lease.hold(owner, InstancePatch.nothing))
            for entry in sorted(self._parts(), key=id):
                stack.enter_context(entry._lent(owner))
            yield

    def run(
        self, make: Callable[[], InstancePatch], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One forward of the model, which is this thread's, with what ``make`` returns on it."""
        return self.lease.run(make(), self.below, args, kwargs)

    @contextmanager
    def _lent(self, owner: Owner) -> Iterator[None]:
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
