"""Which arguments have the same trace: read off the device only where they are other objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...sharing.arguments import latents_of, version_of
from .structure import first_parameter
from .trace import PLAIN, Call, contents

_MOST = 8


class Signatures:
    """Signatures of arguments (:func:`signature_of`).

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


def signature_of(call: Call) -> Any:
    """Equal for calls whose traces are equal: shapes of tensors, masks and other settings.

    Masks, sizes and indices tell where a token is, and are compared by value.
    """
    found: list[Any] = []
    _sign("", call, found)
    return tuple(found)


def _sign(name: str, value: Any, found: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        found.append((name, tuple(value.shape), value.dtype, value.device))
        if not (value.is_floating_point() or value.is_complex()) and value.ndim > 1:
            found.append(value.cpu().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            _sign(f"{name}.{key}", item, found)
    elif isinstance(value, list | tuple):
        found.append((name, len(value)))
        for item in value:
            _sign(name, item, found)
    elif not isinstance(value, float):
        found.append((name, value if isinstance(value, PLAIN) else contents(value)))
