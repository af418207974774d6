"""Linear layers that see the same input, as one product.

Each layer's ``forward`` is replaced while its model runs: the first of a group computes for all,
the others hand out their part of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..sharing.replacement import Replacement
from ..sharing.rows import BranchState, change_level
from ..sharing.threads import HERE
from .packed_linears import PackedLinears, is_plain, is_untouched
from .processors import is_fusable

Child = tuple[nn.Module, str, nn.Module]
"""A module, the name of a child, and the child that has to be there."""


class Group:
    """Linear layers that are computed together, or each on its own.

    Where a forward needs gradients of the weights, none of this is on its model: the whole has none
    to hand on to the parameters. Inputs that need gradients are left to the layers, too.

    Attributes:
        children: every layer and activation that takes part, and where it has to be.
        members: what takes the place of their forwards, in the same order.
        pending: what belongs to the running forward, to be forgotten with it.
        wasted: what was computed together was not asked for: the layers see different inputs.
        addresses: where the weights of layers lay that were not joined, when last looked at.
    """

    def __init__(self, state: BranchState, children: Sequence[Child]) -> None:
        self.children = list(children)
        linears = [child for _, _, child in children if isinstance(child, nn.Linear)]
        self.packed = PackedLinears(linears)
        self.members: list[Replacement] = []
        self.pending: list[Any] = []
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

    def forget(self) -> None:
        """Free what belongs to one forward."""
        self.pending = []


class QKV(Group):
    """Query, key and value of one attention, called in this order on the same tensor.

    Args:
        attention: whose processor has to be a known one.
        names: of the layers. Perturbed attention projects V on rows for which it needs no queries
            and keys: there it is two.
        perturbed: our processor runs in this attention, whatever it has of its own.
        fusable: class names of the processors of its own that take what is computed together.
    """

    def __init__(
        self,
        state: BranchState,
        attention: nn.Module,
        names: Sequence[str],
        *,
        perturbed: bool = False,
        fusable: frozenset[str] = frozenset(),
    ) -> None:
        children = [(attention, name, attention._modules[name]) for name in names]
        super().__init__(state, children)  # type: ignore[arg-type]
        self.attention = attention
        self.perturbed = perturbed
        self.fusable = fusable
        # compiled graphs guard on these objects: they are made once
        query, *others = self.packed.linears
        self.members = [_Query(self, query)]
        self.members += [
            _KeyOrValue(self, index, linear, last=index == len(others))
            for index, linear in enumerate(others, 1)
        ]
        # inputs, and what was computed from them that nobody has asked for yet: CogVideoX projects
        # text and image in turns, through the same layers
        self.pending: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []

    def is_whole(self) -> bool:
        fused = getattr(self.attention, "fused_projections", False)
        known = (self.perturbed and not fused) or is_fusable(self.attention, self.fusable)
        return known and super().is_whole()


class _Query(Replacement):
    """The forward of the first layer of a :class:`QKV`: it computes all of them."""

    def __init__(self, group: QKV, linear: nn.Linear) -> None:
        super().__init__(group.state, linear)
        self.group = group

    # these stand in every attention of a model: as few calls as there can be

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.state.thread is not HERE.me:
            return self._base(*args, **kwargs)
        group = self.group
        packed = group.packed
        if packed.weight is None or kwargs or args[1:] or not args:
            return self.run_original(args, kwargs)
        x = args[0]
        if x.requires_grad:
            return self.run_original(args, kwargs)
        whole = F.linear(x, packed.weight, packed.bias)
        parts = whole.split_with_sizes(packed.rows, -1)
        group.pending = [*group.pending[-1:], (x, parts)]
        return parts[0]


class _KeyOrValue(Replacement):
    """The forward of another layer of a :class:`QKV`: it hands out what the first has computed.

    Args:
        last: nobody asks for the same input afterwards.
    """

    def __init__(self, group: QKV, index: int, linear: nn.Linear, *, last: bool) -> None:
        super().__init__(group.state, linear)
        self.group = group
        self.index = index
        self.last = last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.state.thread is not HERE.me:
            return self._base(*args, **kwargs)
        group, pending = self.group, self.group.pending
        if not pending or kwargs or args[1:] or not args or group.packed.weight is None:
            return self.run_original(args, kwargs)
        x = args[0]
        for at, (seen, parts) in enumerate(pending):
            if seen is x:
                if self.last:
                    group.pending = pending[:at] + pending[at + 1 :]
                return parts[self.index]
        if self.last and not torch.compiler.is_compiling():
            group.wasted = True
        return self.run_original(args, kwargs)


class TimeProjections(Group):
    """Every projection of the time embedding: ``linear(act(temb))``, in one product per forward.

    All of them see the same embedding, on the rows of one level or another. Rows of the branches
    that begin later are those of the branch they begin from.

    Args:
        layers: ``(module, name of its activation, name of its linear layer)`` in any order. The
            activation is left to the product: called with an embedding, it returns what it is
            given.
        modules: all of the model, whose hooks could write into the embedding.
    """

    def __init__(
        self,
        state: BranchState,
        layers: Sequence[tuple[nn.Module, str, str]],
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self._owns, self._hooked = list(map(vars, modules)), False
        children = [(owner, name, owner._modules[name]) for owner, *names in layers
                    for name in names]  # fmt: skip
        super().__init__(state, children)  # type: ignore[arg-type]
        self._activations = []
        for index, linear in enumerate(self.packed.linears):
            owner, name, _ = self.children[2 * index]
            place = owner._modules, self.children[2 * index + 1][1]
            activation = _Activation(self, owner._modules[name], linear, place)
            self._activations.append(activation)
            self.members += [activation, _TimeProjection(self, index, linear, activation)]
        self.forget()

    def forget(self) -> None:
        super().forget()
        self._step = -1
        # the embedding as it was first seen, and as it was last seen: other rows are other views
        self._x: torch.Tensor | None = None
        self._latest: torch.Tensor | None = None
        self._version: int | None = None
        self._wholes: dict[int, torch.Tensor] = {}
        self._parts: dict[int, Sequence[torch.Tensor]] = {}
        for activation in self._activations:
            activation.left = None

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """The projection of an embedding by one layer; ``None``: it has to compute that itself."""
        version = self._version
        if (
            x is not self._latest
            or self._step != self.state.step
            or (version is not None and x._version != version)
        ):
            if not self._is_known(x):
                return None
            self._latest = x
        return self._parts[x.shape[0]][index]

    def _is_known(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is this forward's embedding, whose projections there are from here on."""
        if self.packed.weight is None or x.requires_grad:
            return False
        # inference tensors do not tell whether somebody has written into them
        version = None if x.is_inference() else x._version
        if self._step != self.state.step or self._x is None:
            self._wholes, self._parts = {}, {}
            self._step, self._x, self._version = self.state.step, x, version
            self._hooked = False
            for own in self._owns if version is None else ():  # a loop makes no calls
                if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                    self._hooked = True
                    return False
        elif self._hooked or not _is_same(x, self._x) or version != self._version:
            return False
        rows = x.shape[0]
        if rows not in self._parts:
            self._wholes[rows] = whole = self._at_level(x)
            self._parts[rows] = whole.split_with_sizes(self.packed.rows, -1)
        return True

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

    Args:
        place: the children of their module, and the name that the layer has there.

    Attributes:
        left: the embedding that the layer behind has to activate itself.
    """

    def __init__(
        self,
        group: TimeProjections,
        activation: Any,
        linear: nn.Linear,
        place: tuple[dict[str, Any], str],
    ) -> None:
        super().__init__(group.state, activation)
        self.group = group
        self._own = vars(activation)
        self._linear = linear
        self._layer = vars(linear)
        self._children, self._name = place
        self.member: Any = None
        self.left: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.state.thread is not HERE.me:
            return self._base(*args, **kwargs)
        self.left, weight = None, self.group.packed.weight
        if weight is not None and args and not args[1:] and not kwargs:
            x, own, layer, children = args[0], self._own, self._layer, self._children
            # somebody may have wrapped or hooked one of both meanwhile, or put another layer in the
            # place: what they see is activated then
            ours = (
                "forward" in layer
                and layer["forward"] is self.member
                and "forward" in own
                and own["forward"] is self
                and self._name in children
                and children[self._name] is self._linear
                and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
                and not (layer["_forward_hooks"] or layer["_forward_pre_hooks"])
            )
            if ours and x.ndim == 2 and x.dtype == weight.dtype:
                self.left = x
                self.group.pending = [x]
                return x
        self._inside = True
        try:  # as in run_original: a resnet activates its images with the same module
            return self.original(*args, **kwargs)
        finally:
            self._inside = False


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.state.thread is not HERE.me:
            return self._base(*args, **kwargs)
        left, self.activation.left = self.activation.left, None
        if left is None:
            return self.run_original(args, kwargs)
        if args and args[0] is left and not args[1:] and not kwargs:
            part = self.group.part(self.index, left)
            if part is not None:
                return part
        # what the activation has left to us
        args = tuple([F.silu(x) if x is left else x for x in args])
        kwargs = {name: F.silu(x) if x is left else x for name, x in kwargs.items()}
        return self.run_original(args, kwargs)


def _is_same(x: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether two embeddings are the same memory, apart from how many rows of it there are."""
    return (
        x.data_ptr() == first.data_ptr()
        and x.dtype == first.dtype
        and x.shape[1:] == first.shape[1:]
        and x.stride() == first.stride()
    )
