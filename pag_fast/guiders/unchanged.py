"""Whether what cond's forward ran on is still there: its arguments, weights and settings.

Both are asked between two forwards of one step, so what cannot tell that it has changed counts as
changed.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from ..models.traced.trace import contents
from ..runtime.access.entry import NAME, SETTER
from ..sharing.arguments import version_of
from ..sharing.weight_signature import WeightSignature, tensors_in

_PLAIN = int | float | str | None
_NO_SETTINGS = frozenset(vars(nn.Module())) | {NAME, SETTER}
_CHANGED = "weights, settings or hooks of the model have changed since cond's forward."
_BLIND = (
    "weights that were made in torch.inference_mode() do not tell whether they have changed since "
    "cond's forward: load the model outside of it."
)


class Arguments:
    """Arguments of a forward, as they were when it began.

    Attributes:
        leaves: everything in them, the keys of dictionaries among it.
    """

    def __init__(self, value: Any = ()) -> None:
        self.leaves = leaves(value)
        self._marks = [_mark(x) for x in self.leaves]

    def others(self, now: list[Any]) -> frozenset[int]:
        """Places of what is another object now."""
        pairs = enumerate(zip(self.leaves, now, strict=False))
        return frozenset(at for at, (a, b) in pairs if a is not b)

    def equal(self, now: list[Any], *, values: bool) -> bool:
        """Whether arguments are the same; ``values``: also those of tensors that are others."""
        return len(self.leaves) == len(now) and all(
            _is_as_marked(b, mark) if a is b else _equal(a, b, values=values)
            for a, b, mark in zip(self.leaves, now, self._marks, strict=True)
        )


class Unchanged:
    """What one model computes with: its weights, adapters and settings.

    Its own attributes are compared without what an entry has put there, as every pass has another.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = WeightSignature(model.children())
        self._looks = 0
        self._noted: tuple[int, int] | None = None
        self._held: list[Any] = []
        self._versions: list[int] = []

    def note(self, model: nn.Module, found: int) -> None:
        """Cond's forward has run; ``found`` counts changes that others have made."""
        now = self._look(), found
        if now != self._noted:
            self._noted = now
        self._held, self._versions = self._own(model)

    def why_not(self, model: nn.Module, found: int) -> str:
        """What has changed since, as a sentence; or ``""``."""
        held, versions = self._own(model)
        same = (
            (self._look(), found) == self._noted
            and versions == self._versions
            and len(held) == len(self._held)
            and all(map(is_, held, self._held))
        )
        if not same:
            return _CHANGED
        return "" if self._weights.tells and -1 not in versions else _BLIND

    def forget(self) -> None:
        """Hold nothing that the model itself does not hold any more."""
        self._held, self._versions = [], []

    def _look(self) -> int:
        self._looks += 1
        return self._weights.look(self._looks)

    def _own(self, model: nn.Module) -> tuple[list[Any], list[int]]:
        """What a model itself has, and what its collections hold; versions of its own tensors."""
        own = {key: x for key, x in vars(model).items() if key not in _NO_SETTINGS}
        others, collections = tensors_in([own])
        weights = [*model._parameters.values(), *model._buffers.values()]
        versions = [version_of(x) for x in weights if x is not None]
        # what a forward of inference mode has left there, as models leave tables, is no weight
        versions += [x._version for x in others if not x.is_inference()]
        return [*weights, *own.values(), *chain.from_iterable(map(_items, collections))], versions


def _items(x: Any) -> Any:
    return chain(x, x.values()) if isinstance(x, dict) else x


def leaves(value: Any) -> list[Any]:
    """Everything in nested arguments, the keys of dictionaries among it."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def _mark(x: Any) -> Any:
    """What another value of one object shows by."""
    if isinstance(x, torch.Tensor):
        # inference tensors do not tell whether they were written into
        return x.clone() if x.is_inference() else x._version
    return None if isinstance(x, _PLAIN) else contents(x)


def _is_as_marked(x: Any, mark: Any) -> bool:
    if isinstance(mark, torch.Tensor):
        return torch.equal(x, mark)
    if isinstance(x, torch.Tensor):
        return bool(x._version == mark)
    # an object that may hold tensors tells nothing
    return isinstance(x, _PLAIN) or (mark is not None and contents(x) == mark)


def _equal(a: Any, b: Any, *, values: bool) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and (not values or torch.equal(a, b))
    return type(a) is type(b) and isinstance(a, int | float | str) and a == b
