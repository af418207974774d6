"""Linear layers that see the same input, as one product.

Each layer's ``forward`` is replaced while its model runs: the first of a group computes for all,
the others hand out their part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..sharing.replacement import Replacement
from ..sharing.rows import BranchState, change_level
from .packed_linears import PackedLinears, is_plain, is_untouched
from .processors import is_fusable

Child = tuple[nn.Module, str, nn.Module]
"""A module, the name of a child, and the child that has to be there."""


class Group:
    """Linear layers that are computed together, or each on its own.

    Attributes:
        children: every layer and activation that takes part, and where it has to be.
        members: what takes the place of their forwards, in the same order.
        broken: the layers have been parted while a call runs; each computes on its own.
        wasted: what was computed together was not asked for: the layers see different inputs.
        addresses: where the weights of layers lay that were not joined, when last looked at.
    """

    def __init__(self, state: BranchState, children: Sequence[Child]) -> None:
        self.children = list(children)
        linears = [child for _, _, child in children if isinstance(child, nn.Linear)]
        self.packed = PackedLinears(linears)
        self.members: list[Replacement] = []
        self.broken = False
        self.wasted = False
        self.addresses: list[int] | None = None
        self.use(state)

    def use(self, state: BranchState) -> None:
        """Belong to the forwards of this state's model."""
        self.state = state
        for member in self.members:
            member.state = state

    def is_whole(self) -> bool:
        """Whether every layer and activation is where it was, with nothing on it."""
        return not self.wasted and all(
            parent._modules.get(name) is child
            and (is_plain(child) if isinstance(child, nn.Linear) else is_untouched(child))
            for parent, name, child in self.children
        )

    def differentiates(self, x: torch.Tensor) -> bool:
        """Whether gradients are wanted: the whole has none to hand on to the parameters."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(linear.weight.requires_grad for linear in self.packed.linears)
        )

    def forget(self) -> None:
        """Free what belongs to one forward."""


class QKV(Group):
    """Query, key and value of one attention, called in this order on the same tensor.

    Args:
        attention: whose processor has to be a known one.
        names: of the layers. Perturbed attention projects V on rows for which it needs no queries
            and keys: there it is two.
        perturbed: our processor runs in this attention, whatever it has of its own.
    """

    def __init__(
        self,
        state: BranchState,
        attention: nn.Module,
        names: Sequence[str],
        *,
        perturbed: bool = False,
    ) -> None:
        children = [(attention, name, attention._modules[name]) for name in names]
        super().__init__(state, children)  # type: ignore[arg-type]
        self.attention = attention
        self.perturbed = perturbed
        # compiled graphs guard on these objects: they are made once
        self.members = [
            _Projection(self, index, linear) for index, linear in enumerate(self.packed.linears)
        ]
        self.forget()

    def is_whole(self) -> bool:
        fused = getattr(self.attention, "fused_projections", False)
        known = (self.perturbed and not fused) or is_fusable(self.attention)
        return known and super().is_whole()

    def forget(self) -> None:
        # CogVideoX projects text and image in turns, through the same layers
        self._pending: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """The output of one layer; ``None``: it has to compute that itself."""
        weight, last = self.packed.weight, len(self.packed.linears) - 1
        if self.broken or weight is None or self.differentiates(x):
            return None
        if index == 0:
            parts = F.linear(x, weight, self.packed.bias).split(self.packed.rows, dim=-1)
            self._pending = [*self._pending[-1:], (x, parts)]
            return parts[0]
        for at, (seen, parts) in enumerate(self._pending):
            if seen is x:
                if index == last:
                    self._pending = self._pending[:at] + self._pending[at + 1 :]
                return parts[index]
        if index == last and self._pending and not torch.compiler.is_compiling():
            self.wasted = True
        return None


class _Projection(Replacement):
    """The forward of a query, key or value projection."""

    def __init__(self, group: QKV, index: int, linear: nn.Linear) -> None:
        super().__init__(group.state, linear)
        self.group = group
        self.index = index

    def run(self, *args: Any, **kwargs: Any) -> Any:
        part = self.group.part(self.index, args[0]) if len(args) == 1 and not kwargs else None
        return self.original(*args, **kwargs) if part is None else part


class TimeProjections(Group):
    """Every projection of the time embedding: ``linear(act(temb))``, in one product per forward.

    All of them see the same embedding, on the rows of one level or another. Rows of the branches
    that begin later are those of the branch they begin from.

    Args:
        layers: ``(module, name of its activation, name of its linear layer)`` in any order. The
            activation is left to the product: called with an embedding, it returns what it is
            given.
    """

    def __init__(self, state: BranchState, layers: Sequence[tuple[nn.Module, str, str]]) -> None:
        children = [(owner, name, owner._modules[name]) for owner, *names in layers
                    for name in names]  # fmt: skip
        super().__init__(state, children)  # type: ignore[arg-type]
        for index, linear in enumerate(self.packed.linears):
            owner, name, _ = self.children[2 * index]
            activation = _Activation(self, owner._modules[name], linear)
            self.members += [activation, _TimeProjection(self, index, linear, activation)]
        self.forget()

    def forget(self) -> None:
        self._step = -1
        self._x: torch.Tensor | None = None
        self._version: int | None = None
        self._wholes: dict[int, torch.Tensor] = {}
        self._parts: dict[int, Sequence[torch.Tensor]] = {}
        for member in self.members:
            if isinstance(member, _Activation):
                member.left = None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether an embedding can be projected by all layers at once."""
        weight = self.packed.weight
        return (
            x.ndim == 2
            and not self.broken
            and weight is not None
            and x.dtype == weight.dtype
            and not self.differentiates(x)
        )

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """The projection of an embedding by one layer; ``None``: it is another embedding."""
        if self.broken or self.packed.weight is None:
            return None
        version = None if x.is_inference() else x._version
        if self._step != self.state.step or self._x is None:
            self._wholes, self._parts = {}, {}
            self._step, self._x, self._version = self.state.step, x, version
        elif not _is_same(x, self._x) or version != self._version:
            return None
        rows = x.shape[0]
        if rows not in self._parts:
            self._wholes[rows] = whole = self._at_level(x)
            self._parts[rows] = whole.split(self.packed.rows, dim=-1)
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
        assert self.packed.weight is not None
        return F.linear(F.silu(x), self.packed.weight, self.packed.bias)


class _Activation(Replacement):
    """The forward of a SiLU that leaves embeddings to the layer behind it.

    Attributes:
        left: the embedding that the layer behind has to activate itself.
    """

    def __init__(self, group: TimeProjections, activation: Any, linear: nn.Linear) -> None:
        super().__init__(group.state, activation)
        self.group = group
        self.linear = linear
        self.member: Any = None
        self.left: torch.Tensor | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.left = None
        # somebody may have wrapped the layer meanwhile: what it gets is activated then
        ours = vars(self.linear).get("forward") is self.member
        if not ours or kwargs or len(args) != 1 or not self.group.takes(args[0]):
            return self.original(*args, **kwargs)
        self.left = args[0]
        return args[0]


class _TimeProjection(Replacement):
    """The forward of a projection of the time embedding."""

    def __init__(
        self, group: TimeProjections, index: int, linear: nn.Linear, activation: _Activation
    ) -> None:
        super().__init__(group.state, linear)
        self.group = group
        self.index = index
        self.activation = activation
        activation.member = self

    def run(self, *args: Any, **kwargs: Any) -> Any:
        left, self.activation.left = self.activation.left, None
        if left is None or len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        x = args[0]
        part = self.group.part(self.index, x) if x is left else None
        return self.original(F.silu(x)) if part is None else part


def _is_same(x: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether two embeddings are the same memory, apart from how many rows of it there are."""
    return (
        x.data_ptr() == first.data_ptr()
        and x.dtype == first.dtype
        and x.shape[1:] == first.shape[1:]
        and x.stride() == first.stride()
    )
