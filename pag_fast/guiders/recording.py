"""The forwards of modules in front of the fork: recorded in one forward, not run in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..sharing.resume import Known


class Replacement:
    """What is put in the place of one module's call while a denoiser runs.

    A module that is compiled by itself is intercepted in front of its graph, others at their
    ``forward``, which is traced where the whole model is compiled.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._bound: Callable[..., Any] = module.forward
        self._seen: Any = vars(module).get("forward")
        self.original: Callable[..., Any] = self._bound

    def install(self) -> Callable[[], None]:
        """Put it on the module; returns what puts back the very objects that were there."""
        own = vars(self.module)
        name = "forward" if own.get("_compiled_call_impl") is None else "_compiled_call_impl"
        before = own.get(name)
        if name == "forward":
            # a method is another object whenever it is asked for, and compiled graphs guard on it
            if before is not self._seen:
                self._bound, self._seen = self.module.forward, before
            self.original = self._bound
        else:
            self.original = own[name]
        own[name] = self

        def restore() -> None:
            if vars(self.module).get(name) is not self:
                return
            if before is None:
                del vars(self.module)[name]
            else:
                vars(self.module)[name] = before

        return restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Record(Replacement):
    """Runs the module and keeps what a resumed forward needs of its output.

    Attributes:
        value: the output: tensors that are kept, and one element in the shape of each other one.
        versions: of the kept tensors, outside of compiled graphs.
    """

    def __init__(self, known: Known) -> None:
        super().__init__(known.module)
        self.kept = known.kept
        self.value: Any = None
        self.versions: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        self.value = _walk(out, self.kept, _outline)[0]
        if not torch.compiler.is_compiling():
            self.versions = self._versions()
        return out

    def is_intact(self) -> bool:
        """Whether nobody has written into the output since it was made."""
        return self.versions == self._versions()

    def _versions(self) -> list[int]:
        return [x._version for x in _tensors(self.value) if not x.is_inference()]

    def take(self) -> Any:
        """The value, which is forgotten here."""
        value, self.value = self.value, None
        return value


class Replay(Replacement):
    """Returns what a :class:`Record` holds, once, without running the module."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.module)
        self.record = record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = self.record
        value = record.value
        if not torch.compiler.is_compiling():  # free as soon as the model frees it
            record.value = None
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
