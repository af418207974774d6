"""Which arguments have the same trace: read off the device only where they are other objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...sharing.arguments import latents_of, version_of
from .structure import first_parameter
from .trace import contents, signature_of

_MOST = 8


class Signatures:
    """Signatures of arguments (:func:`pag_fast.models.traced.trace.signature_of`).

    They are known by what they were read off; the arguments are kept alive, as another object
    would otherwise have the address of an old one.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Any]] = {}

    def of(self, model: nn.Module, call: dict[str, Any]) -> Any:
        """The signature of a model's arguments."""
        latents, now = first_parameter(model), list[Any]()
        for name, x in call.items():
            if name == latents:
                now += [(name, latents_of(call).shape)]
            elif name != "timestep":
                own = version_of(x) if isinstance(x, torch.Tensor) else contents(x)
                now += [(name, id(x), own)]
        key = tuple(now)
        if key not in self._known:
            lasting = {name: x for name, x in call.items() if name != latents}
            self._known[key] = lasting, signature_of(call)
            while len(self._known) > _MOST:
                self._known.pop(next(iter(self._known)))
        return self._known[key][1]
