"""A factor of one that leaves what it divides alone."""

from __future__ import annotations

from typing import Any

import torch

_DIVISIONS = (torch.Tensor.div, torch.Tensor.__truediv__)


class _Unit(float):
    """``1.0``, except that ``tensor / unit`` is the tensor itself, without a kernel.

    Diffusers divides the output of every attention and every resnet by a factor that is one in all
    published models.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # every attention and resnet comes here: it costs attributes and comparisons, no calls
        if func in _DIVISIONS and not kwargs and args[1:] and args[1] is UNIT and not args[2:]:
            divided = args[0]
            if divided is not UNIT and divided.dtype.is_floating_point:
                return divided
        plain = [1.0 if isinstance(value, cls) else value for value in args]
        named = {k: 1.0 if isinstance(v, cls) else v for k, v in (kwargs or {}).items()}
        return func(*plain, **named)

    def __reduce__(self) -> Any:
        return float, (1.0,)


UNIT = _Unit(1.0)
