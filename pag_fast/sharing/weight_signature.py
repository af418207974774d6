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

# of peft's layers: scales by adapter, and which adapters count
_ADAPTERS = ("scaling", "_active_adapter", "merged_adapters")
_version = attrgetter("_version")


class WeightSignature:
    """What some modules of one model compute with: another one whenever somebody has changed it.

    They are compared once in a forward, when the first of them is entered, behind the hooks that
    fetch the model's weights; modules with hooks of their own are not among them. Parameters and
    buffers are held as objects, since an ``id`` may be given again, with their versions and
    addresses. Of what else a module has, the objects are compared, layers inside among them, and of
    LoRAs their scales.

    Attributes:
        step: the forward in which they were last compared.
        number: another one whenever something has changed.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self.step: int | None = None
        self.number = 0
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
        """Whether changes of one of the modules show; those of inference tensors do not."""
        return root not in self._blind

    def _watched(self) -> list[nn.Module]:
        """Everything that changes show on; notes the modules that have inference tensors."""
        inside = dict.fromkeys(chain.from_iterable(root.modules() for root in self._roots))
        blind = []
        for root in self._roots:
            if any(map(torch.Tensor.is_inference, chain(root.parameters(), root.buffers()))):
                blind.append(root)
        for module in chain.from_iterable(root.modules() for root in blind):
            inside.pop(module, None)
        self._blind = frozenset(blind)
        return list(inside)

    def _take(self) -> None:
        """Note what there is now."""
        inside = self._watched()
        dicts: list[Any] = [d for m in inside for d in (m._parameters, m._buffers)]
        children: list[Any] = [module._modules for module in inside]
        self._empty = [d for d in chain(dicts, children) if not d]
        self._holding = [d for d in dicts if d]
        # a plain linear layer has no settings that its forward reads
        owns = [vars(m) for m in inside if type(m) is not nn.Linear]
        self._adapted = [own for own in owns if not own.keys().isdisjoint(_ADAPTERS)]
        # an address is compared only as long as nothing else can have got it
        values: Iterable[Any] = chain.from_iterable(map(dict.values, self._holding))
        self._tensors = [x for x in values if x is not None]
        # a layer may be put in another's place, as peft does when it is unloaded
        self._holding += [d for d in children if d]
        self._holding += owns
        self._held = list(chain.from_iterable(map(dict.values, self._holding)))
        self._device = region_of(self._tensors)
        self._seen = self._glance()

    def _changed(self) -> bool:
        held = list(chain.from_iterable(map(dict.values, self._holding)))
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
            list(map(torch.Tensor.data_ptr, self._tensors)),
            [_adapters(own) for own in self._adapted] if self._adapted else (),
        )


def _adapters(own: dict[str, Any]) -> list[Any]:
    """Scales and names of adapters, copied: they are changed in place."""
    found = [own.get(name) for name in _ADAPTERS]
    return [dict(x) if isinstance(x, dict) else str(x) for x in found]
