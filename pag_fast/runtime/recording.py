"""The forwards of modules in front of the fork: recorded in one forward, not run in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..sharing.plan import compiled_call
from ..sharing.replacement import MISSING, Replacement
from ..sharing.resume import Known
from ..sharing.rows import BranchState
from ..sharing.sequence import OutOfOrder
from .access.instance_patch import Entry


class Intercepted(Replacement):
    """What is put in the place of one module's call while a denoiser runs.

    A module that is compiled by itself is intercepted in front of its graph, others at their
    ``forward``, which is traced where the whole model is compiled.
    """

    def __init__(self, state: BranchState, module: nn.Module) -> None:
        super().__init__(state, module)
        self._place = "forward"

    def entry(self) -> Entry:
        """Itself, ready for an instance patch."""
        own = vars(self.module)
        place = "forward" if compiled_call(self.module) is None else "_compiled_call_impl"
        if place != self._place:
            # what was noted of the other place is nothing to go back to here
            self._place = place
            self.displaced = own.get(place, MISSING)
            self.original = self._class_forward if self.displaced is MISSING else self.displaced
            self._base = self.original
        return own, place, self


class Record(Intercepted):
    """Runs the module and keeps what a resumed forward needs of its output.

    Attributes:
        value: the output: tensors that are kept, and one element in the shape of each other one.
        versions: of the kept tensors, outside of compiled graphs.
        times: how often the module has run, likewise.
    """

    def __init__(self, state: BranchState, known: Known) -> None:
        super().__init__(state, known.module)
        self.kept = known.kept
        self.value: Any = None
        self.versions: list[int] = []
        self.times = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        out = self.run_original(args, kwargs)
        self.value = self.note(out)
        if not torch.compiler.is_compiling():
            self.versions = self._versions()
            self.times += 1
        return out

    def note(self, out: Any) -> Any:
        """What is kept of an output."""
        return _walk(out, self.kept, _outline)[0]

    def is_intact(self) -> bool:
        """Whether there is one output, and nobody has written into it since it was made."""
        return self.times <= 1 and self.versions == self._versions()

    def _versions(self) -> list[int]:
        return [x._version for x in _tensors(self.value) if not x.is_inference()]

    def take(self) -> Any:
        """The value, which is forgotten here."""
        value, self.value = self.value, None
        self.times = 0
        return value


class Replay(Intercepted):
    """Returns what a :class:`Record` holds, once, without running the module.

    Raises:
        OutOfOrder: a perturbed layer has run before it, or the module did not in the other forward.
    """

    def __init__(self, record: Record) -> None:
        super().__init__(record.state, record.module)
        self.record = record

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.slabs is None:  # somebody has kept it from a perturbed forward
            return self._base(*args, **kwargs)
        record = self.record
        value = record.value
        if not torch.compiler.is_compiling():  # free as soon as the model frees it
            record.value = None
            if value is None or self.state.entered:
                raise OutOfOrder("a module ran in another order than in cond's forward")
        return _walk(value, record.kept, _fill)[0]


def _outline(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(()).expand(x.shape)


def _fill(x: torch.Tensor) -> torch.Tensor:
    # models write into streams (FreeU, T2I-Adapters): memory of its own, of any content
    return x.new_empty(x.shape)


def _walk(
    value: Any,
    kept: frozenset[int] | None,
    other: Callable[[torch.Tensor], torch.Tensor],
    index: int = 0,
) -> tuple[Any, int]:
    """``value`` with ``other`` applied to the tensors that are not kept; how many there are."""
    if isinstance(value, torch.Tensor):
        return value if kept is None or index in kept else other(value), index + 1
    if isinstance(value, tuple | list):
        items = []
        for item in value:
            item, index = _walk(item, kept, other, index)
            items.append(item)
        return (tuple(items) if isinstance(value, tuple) else items), index
    return value, index


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [x for item in value for x in _tensors(item)]
    return []
