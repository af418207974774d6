"""The same arithmetic in fewer launches, for modules that diffusers runs unperturbed too.

In eager mode a step is a thousand kernels and more, many of them small. Three kinds can go without
a change of the result: divisions by one, separate products of the same input (queries, keys and
values; the projections of the time embedding, one in every resnet), and activations in front of the
latter. So can the signatures of processors, which diffusers has Python build for every attention.
What takes their place is on the model while a forward of ours runs; compilers do all of this
themselves, and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from ..ops.autocast import region_of
from ..sharing.plan import count_places, eager_modules, has_diffusers_hooks
from ..sharing.rows import BranchState
from .packed_linears import shared_memory
from .processors import attention_projections, time_projection
from .projections import QKV, Group, TimeProjections
from .signatures import asks_for_signature, signed
from .unit import UNIT

__all__ = ["Fusion"]

Entry = tuple[dict[str, Any], str, Any]

_DIVISORS = ("rescale_output_factor", "output_scale_factor")
_call = attrgetter("__call__")
_HOOKS = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


class Fusion:
    """What can be computed together, or left out, in one model.

    Args:
        model: a denoiser or ControlNet that is not in training.
        perturbed: its perturbed attentions, and how many of their projections see the same rows.
        traced: join queries, keys and values of compiled modules too. Their compiler sees the one
            product; it would not join the weights itself.
        state: of the model, which says whose forward runs.
        fusable: class names of diffusers' attention processors that take projections that are views
            of one product: those of the model's description.

    Attributes:
        entries: ``(dict, key, value)`` of everything that has to be on the model while a forward of
            ours runs. The same list, of the same objects, as long as :meth:`refresh` says so.
    """

    def __init__(
        self,
        model: nn.Module,
        perturbed: Mapping[str, int] | None = None,
        *,
        traced: bool = False,
        state: BranchState | None = None,
        fusable: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self._fusable = fusable
        self.state = BranchState() if state is None else state
        self.divisors: list[tuple[nn.Module, str]] = []
        self.groups: list[Group] = []
        self.asking: list[nn.Module] = []
        self._collect(perturbed or {}, traced)
        self.entries: list[Entry] = []
        self._together: list[Entry] = []  # while nobody needs gradients
        self._apart: list[Entry] = []
        self._used: list[Group] = []
        self._looked = False
        self._watch = _Watch(model, self.groups, self.divisors, self.asking)
        self._seen: Any = None

    def _collect(self, perturbed: Mapping[str, int], traced: bool) -> None:
        """Find everything in the model that could be left out or computed together."""
        eager = {name for name, _ in eager_modules(self.model)}
        places = count_places(self.model)
        # a tracer would guard on the hooks of every module
        hookable = () if traced else tuple(self.model.modules())
        layers: list[tuple[nn.Module, str, str]] = []
        for name, module in self.model.named_modules():
            if name in eager:
                self.divisors += [(module, x) for x in _DIVISORS if _is_one(module, x)]
                if name not in perturbed and asks_for_signature(module):
                    self.asking.append(module)
                names = time_projection(module)
                # an activation that somebody else runs too has to activate for him
                if names and all(places[id(module._modules[x])] == 1 for x in names):
                    layers.append((module, *names))
            if not (traced or name in eager):
                continue
            for parts, linears in attention_projections(name, module, perturbed.get(name, 3)):
                if all(places[id(linear)] == 1 for linear in linears):
                    ours = name in perturbed
                    self.groups.append(
                        QKV(self.state, module, parts, perturbed=ours, fusable=self._fusable)
                    )
        if len(layers) > 1:
            self.groups.append(TimeProjections(self.state, layers, hookable))

    # ---- per forward ----

    def refresh(self) -> bool:
        """Before a forward: join what can be joined, part what is not whole any more.

        Returns whether :attr:`entries` has changed.
        """
        before = self.entries
        paused = self._paused()
        if self._seen is None or self._seen != self._watch.look():
            self._look(paused)
        self.entries = self._apart if paused else self._together
        return self.entries is not before

    def forget(self) -> None:
        """A forward has ended: free what belonged to it."""
        for group in self._used:
            if group.pending:
                group.forget()
            if group.wasted:
                self._seen = None

    def _paused(self) -> bool:
        """Whether the forward needs gradients of the weights, or weights of another dtype."""
        return _autocast(self._watch.device) or (
            torch.is_grad_enabled() and self._watch.needs_grad()
        )

    def _look(self, paused: bool) -> None:
        """Decide for every group whether it is used."""
        moves = _moves(self.model)
        shared: frozenset[int] | None = None
        used, waits = [], False
        for group in self.groups:
            packed = group.packed
            whole = not moves and group.is_whole()
            if packed.joined and not (whole and packed.intact()):
                packed.split()
                group.addresses = _addresses(group)
                waits |= whole
            elif whole and not packed.joined and not paused:
                if shared is None:
                    shared = shared_memory(self.model.modules())
                # weights that move in every forward are not run after
                steady = group.addresses in (None, _addresses(group))
                if packed.fits(shared) and steady:
                    packed.join()
                elif not steady:
                    group.addresses, waits = _addresses(group), True
            elif whole and not packed.joined:
                waits = True
            if packed.joined:
                used.append(group)
        self._use(used)
        self._watch.found()
        # groups that wait are looked at again in the next forward
        self._seen = None if waits else self._watch.look()

    def _use(self, used: list[Group]) -> None:
        apart: list[Entry] = [
            (vars(module), name, UNIT) for module, name in self.divisors if _is_one(module, name)
        ]
        # several attentions may have the same processor
        kept = {id(e[0]): e for e in map(signed, self.asking) if e is not None}
        apart += kept.values()
        together: list[Entry] = [
            (vars(member.module), "forward", member) for group in used for member in group.members
        ]
        together += apart
        self._used, self._looked = used, True
        self._apart = _kept(self._apart, apart)
        self._together = _kept(self._together, together)

    # ---- for good ----

    def release(self) -> None:
        """Give all weights memory of their own again; nothing of ours is used any more."""
        for group in self.groups:
            if group.packed.joined:
                group.packed.split()
            group.forget()
        self._used, self.entries, self._seen = [], [], None
        self._together, self._apart = [], []

    def summary(self) -> tuple[str, ...]:
        """What is computed together or left out, in words; before a forward, what would be."""
        groups = self._used
        if not self._looked:
            shared = shared_memory(self.model.modules())
            usable = not _moves(self.model)
            groups = [g for g in self.groups if usable and g.is_whole() and g.packed.fits(shared)]
        lines = []
        attentions = sum(isinstance(group, QKV) for group in groups)
        if attentions:
            lines.append(f"queries, keys and values as one product: {attentions} times")
        layers = [len(g.packed.linears) for g in groups if isinstance(g, TimeProjections)]
        if layers:
            lines.append(f"projections of the time embedding as one: {sum(layers)}")
        if self.divisors:
            lines.append(f"divisions by one left out: {len(self.divisors)}")
        kept = sum(signed(attention) is not None for attention in self.asking)
        if kept:
            lines.append(f"signatures of processors not built anew: {kept}")
        return tuple(lines)


class _Watch:
    """Everything that decides whether groups are used, in lists that are compared in one go."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        divisors: list[tuple[nn.Module, str]],
        asking: list[nn.Module],
    ) -> None:
        children = [child for group in groups for child in group.children]
        self._parents = [parent._modules for parent, _, _ in children]
        self._names = [name for _, name, _ in children]
        self._modules = [module for _, _, module in children]
        self._owns = list(map(vars, self._modules))
        self.device = "cpu"
        self._note_parameters([x for group in groups for x in group.packed.linears])
        # whoever moves weights around puts a hook on them, or on a module around them
        self._around = [vars(module) for module in _around(model, self._modules)]
        self._attentions = [vars(g.attention) for g in groups if isinstance(g, QKV)]
        self._attending = self._attentions + [vars(attention) for attention in asking]
        self._divisors = [vars(module) for module, _ in divisors]
        self._divisor_names = [name for _, name in divisors]
        self._registries: list[Any] = []
        self._held: list[Any] = []
        self._kinds: list[Any] = []
        self._of_processors: list[Any] = []

    def _note_parameters(self, linears: list[nn.Linear]) -> None:
        """Note where weights and biases are, and where there is no bias."""
        self._bare = [x._parameters for x in linears if x._parameters.get("bias") is None]
        slots = [(x._parameters, name) for x in linears for name in ("weight", "bias")
                 if x._parameters.get(name) is not None]  # fmt: skip
        self._parameters, self._slots = [x for x, _ in slots], [name for _, name in slots]

    def found(self) -> None:
        """Note what may come to hold hooks later, and the objects whose identity counts."""
        registries = [own.get("_diffusers_hook") for own in self._around]
        self._registries = [x for x in registries if x is not None]
        # an address is compared only as long as nothing else can have got it
        processors = self._processors()
        self._held = [self._values(), self._children(), processors, self._factors()]
        self._kinds = list({type(x): None for x in processors})
        self._of_processors = [getattr(x, "__dict__", {}) for x in processors]
        self.device = region_of(self._values())

    def _values(self) -> list[Any]:
        return list(map(dict.get, self._parameters, self._slots))

    def _children(self) -> list[Any]:
        return list(map(dict.get, self._parents, self._names))

    def _processors(self) -> list[Any]:
        return list(map(dict.get, self._attending, repeat("processor")))

    def _factors(self) -> list[Any]:
        return list(map(dict.get, self._divisors, self._divisor_names))

    def look(self) -> Any:
        """A value that is equal to the one before as long as nothing has changed."""
        parameters, processors = self._values(), self._processors()
        there = all(map(is_, self._children(), self._modules))
        if not there or any(map(is_, parameters, repeat(None))):
            return None
        if not all(map(is_, map(dict.get, self._bare, repeat("bias")), repeat(None))):
            return None
        try:
            tensors = [list(map(get, parameters)) for get in _OF_PARAMETERS]
        except (AttributeError, RuntimeError, TypeError):
            return None  # some are no tensors that have memory
        return (
            tensors,
            list(map(id, parameters)),
            list(map(type, self._modules)),
            list(map(len, self._around)),
            list(map(any, map(_HOOKS, self._owns))),
            list(map(id, processors)),
            list(map(type, processors)),
            list(map(_call, self._kinds)),  # a class has another function
            list(map(dict.get, self._of_processors, repeat("__call__"))),
            list(map(dict.get, self._attentions, repeat("fused_projections"))),
            list(map(id, self._factors())),
            [bool(registry.hooks) for registry in self._registries],
        )

    def needs_grad(self) -> bool:
        """Whether some weight requires a gradient."""
        return any(x.requires_grad for x in self._values() if x is not None)


_OF_PARAMETERS: tuple[Callable[[Any], Any], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
    attrgetter("shape"),
    attrgetter("dtype"),
    attrgetter("device"),
)


def _is_one(module: nn.Module, name: str) -> bool:
    """Whether a divisor is the number one; a tensor may become another number in place."""
    value = vars(module).get(name)
    return isinstance(value, (int, float)) and value == 1.0


def _around(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """These modules of a model, and all that they are inside of."""
    inside = {id(module) for module in modules}
    prefixes: set[str] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            parts = name.split(".")
            prefixes.update(".".join(parts[:end]) for end in range(len(parts) + 1))
    return [module for name, module in model.named_modules() if name in prefixes]


def _addresses(group: Group) -> list[int]:
    weights = [linear._parameters.get("weight") for linear in group.packed.linears]
    return [0 if weight is None else weight.data_ptr() for weight in weights]


def _moves(model: nn.Module) -> bool:
    """Whether somebody's hooks fetch, cast or compute weights as the model runs."""
    return any("_hf_hook" in vars(m) or has_diffusers_hooks(m) for m in model.modules())


def _autocast(device: str) -> bool:
    return torch.is_autocast_enabled(device)


def _kept(before: list[Entry], now: list[Entry]) -> list[Entry]:
    """The list from before, where nothing is different."""
    same = len(before) == len(now) and all(
        a[0] is b[0] and a[1] == b[1] and a[2] is b[2] for a, b in zip(before, now, strict=True)
    )
    return before if same else now
