"""Whether the weights that kept outputs were computed with are still those, told in passing.

A model keeps dozens of outputs. Asking each of their weights anything in Python takes ten times as
long as letting ``map`` collect what can be compared with the last forward's.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from ..ops.autocast import region_of

# among them dictionaries that are looked at by themselves
_EVERY_MODULE = frozenset(vars(nn.Module()))
_COLLECTIONS = dict, list, tuple
_version = attrgetter("_version")
_is_inference = torch.Tensor.is_inference


class WeightSignature:
    """What some modules of one model compute with: another one whenever somebody has changed it.

    They are compared once in a forward, when the first of them is entered, behind the hooks that
    fetch the model's weights; modules with hooks of their own are not among them. Parameters,
    buffers and other tensors are held as objects, since an ``id`` may be given again, with their
    versions and addresses. Of what else a module has, the objects are compared, layers inside among
    them, and what is in lists and dictionaries, such as the scales of LoRAs.

    Attributes:
        step: the forward in which they were last compared.
        number: another one whenever something has changed.
        tells: all writes into weights show; those into inference tensors do not.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self.step: int | None = None
        self.number = 0
        self.tells = True
        self._blind: frozenset[nn.Module] = frozenset()
        self._seen: Any = None

    def look(self, step: int) -> int:
        """The number, after a comparison where this forward has had none."""
        if self.step != step:
            self.step = step
            if self._seen is None or self._changed():
                self.number += 1
                self._take()
        return self.number

    def sees(self, root: nn.Module) -> bool:
        """Whether writes into one of the modules show, also those into what else it has."""
        return root not in self._blind

    def _take(self) -> None:
        """Note what there is now."""
        inside = list(dict.fromkeys(chain.from_iterable(root.modules() for root in self._roots)))
        dicts: list[Any] = [d for m in inside for d in (m._parameters, m._buffers)]
        children: list[Any] = [module._modules for module in inside]
        self._empty = [d for d in chain(dicts, children) if not d]
        weights = self._note_weights(dicts)
        # a layer may be put in another's place, as peft does when it is unloaded
        self._holding += [d for d in children if d]
        # a plain linear layer has no settings that its forward reads
        self._note_others(weights, [vars(m) for m in inside if type(m) is not nn.Linear])
        values = chain(map(dict.values, self._holding), self._collections)
        self._held = list(chain.from_iterable(values))
        self._note_blind()
        self._seen = self._glance()

    def _note_weights(self, dicts: list[Any]) -> list[torch.Tensor]:
        """Note parameters and buffers, which are returned."""
        self._holding = [d for d in dicts if d]
        # an address is compared only as long as nothing else can have got it
        values: Iterable[Any] = chain.from_iterable(map(dict.values, self._holding))
        weights = [x for x in values if x is not None]
        self._device = region_of(weights)
        return weights

    def _note_others(self, weights: list[torch.Tensor], owns: list[dict[str, Any]]) -> None:
        """Note attributes, and tensors with a version or an address, weights among them."""
        others, collections = tensors_in(owns)
        self._tensors = [x for x in (*weights, *others) if not x.is_inference()]
        # what is sparse, and what some subclasses wrap, has no address
        plain = [x for x in others if type(x) is torch.Tensor and x.layout is torch.strided]
        self._placed = [*weights, *plain]
        self._holding += owns
        self._holding += [x for x in collections if isinstance(x, dict)]
        # of dictionaries these are the keys
        self._collections = collections

    def _note_blind(self) -> None:
        """Note the modules that have inference tensors: these do not tell of writes."""
        blind, self.tells = [], True
        for root in self._roots:
            weights = any(map(_is_inference, chain(root.parameters(), root.buffers())))
            others = tensors_in(map(vars, root.modules()))[0]
            self.tells = self.tells and not weights
            if weights or any(map(_is_inference, others)):
                blind.append(root)
        self._blind = frozenset(blind)

    def _changed(self) -> bool:
        values: Iterable[Any] = chain(map(dict.values, self._holding), self._collections)
        held = list(chain.from_iterable(values))
        return (
            len(held) != len(self._held)
            or not all(map(is_, held, self._held))
            or self._glance() != self._seen
        )

    def _glance(self) -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(self._device),
            any(self._empty),
            list(map(_version, self._tensors)),
            list(map(torch.Tensor.data_ptr, self._placed)),
        )


def tensors_in(owns: Iterable[dict[str, Any]]) -> tuple[list[torch.Tensor], list[Any]]:
    """Tensors among the attributes of modules, and lists, tuples and dictionaries, nested as well.

    Parameters and buffers are not among them.
    """
    tensors, collections = [], []
    rest = [x for own in owns for name, x in own.items() if name not in _EVERY_MODULE]
    seen: set[int] = set()
    while rest:
        x = rest.pop()
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        elif isinstance(x, _COLLECTIONS) and id(x) not in seen:
            seen.add(id(x))
            collections.append(x)
            rest += dict.values(x) if isinstance(x, dict) else x
    return tensors, collections
