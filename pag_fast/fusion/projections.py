"""Linear layers that see the same input, as one product.

Each layer's ``forward`` is replaced while a call runs: the first of a group computes for all, the
others hand out their part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..sharing.rows import BranchState, change_level
from .packed_linears import Joined


class QKV:
    """Query, key and value of one attention, called in this order on the same tensor.

    Args:
        joined: the three layers.
        together: how many of them see the same rows. Perturbed attention projects V on rows for
            which it needs no queries and keys: there it is two.

    Attributes:
        members: ``(module, forward to give it)`` of every layer that takes part.
        broken: the layers have been parted while a call runs; each computes on its own.
    """

    def __init__(self, joined: Joined, together: int = 3) -> None:
        self.joined = joined
        rows = joined.rows[:together]
        self.weight = joined.weight[: sum(rows)]
        self.bias = None if joined.bias is None else joined.bias[: sum(rows)]
        self._rows = rows
        self.broken = False
        # compiled graphs guard on these objects: they are made once
        linears = joined.linears[:together]
        self.members: list[tuple[nn.Module, Any]] = [
            (linear, _Member(self, index)) for index, linear in enumerate(linears)
        ]
        self.forget()

    def forget(self) -> None:
        self._x: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            return _alone(self.joined.linears[index], x)
        if index == 0:
            parts = F.linear(x, self.weight, self.bias).split(self._rows, dim=-1)
            self._x, self._parts = x, parts
            return parts[0]
        if x is not self._x:
            return _alone(self.joined.linears[index], x)
        part = self._parts[index]
        if index == len(self._parts) - 1:
            self.forget()
        return part


class _Member:
    def __init__(self, group: QKV | TimeProjections, index: int) -> None:
        self.group = group
        self.index = index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.group(self.index, x)


class TimeProjections:
    """Every projection of the time embedding: ``linear(act(temb))``, in one product per forward.

    All of them see the same embedding, on the rows of one level or another. Rows of the branches
    that begin later are those of the branch they begin from.

    Args:
        layers: ``(activation module, linear layer)`` in any order. The activation is left to the
            product: called with an embedding, it returns what it is given.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, nn.Linear]], joined: Joined) -> None:
        self.joined = joined
        self.members: list[tuple[nn.Module, Any]] = [
            (activation, _Activation(activation)) for activation, _ in layers
        ]
        linears = enumerate(joined.linears)
        self.members += [(linear, _Member(self, index)) for index, linear in linears]
        self.state = BranchState()
        self.broken = False
        self.forget()

    def forget(self) -> None:
        self._step = -1
        self._x: torch.Tensor | None = None
        self._wholes: dict[int, torch.Tensor] = {}
        self._parts: dict[int, Sequence[torch.Tensor]] = {}

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        linear = self.joined.linears[index]
        if x.ndim != 2:
            return _alone(linear, x)
        if self.broken:
            return _alone(linear, F.silu(x))
        if self._step != self.state.step or self._x is None:
            self.forget()
            self._step, self._x = self.state.step, x
        elif x.data_ptr() != self._x.data_ptr() or x.dtype != self._x.dtype:
            return _alone(linear, F.silu(x))
        rows = x.shape[0]
        if rows not in self._parts:
            self._wholes[rows] = whole = self._at_level(x)
            self._parts[rows] = whole.split(self.joined.rows, dim=-1)
        return self._parts[rows][index]

    def _at_level(self, x: torch.Tensor) -> torch.Tensor:
        """All projections of ``x``, from those of other rows where there are any."""
        rows, slabs = x.shape[0], self.state.slabs or ()
        for have, whole in self._wholes.items():
            if have > rows:
                return whole[:rows]
            for few in slabs:
                for many in slabs:
                    if few < many and have * many == rows * few:
                        return change_level(whole, few, many)
        return F.linear(F.silu(x), self.joined.weight, self.joined.bias)


class _Activation:
    """A SiLU that leaves embeddings to :class:`TimeProjections`; a resnet uses it elsewhere too."""

    def __init__(self, activation: nn.Module) -> None:
        self.run = activation.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 2 else self.run(x)


def _alone(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)
