"""Counting the FLOPs of ops, whose results on the meta device are found out once for each shape."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

_MOST = 20_000  # results that are remembered; a model has hundreds
# shape, stride and dtype of each tensor that an op returned
_known: dict[Any, list[tuple[Any, ...]]] = {}


class _Unknown(Exception):
    """An argument that is no meta tensor and no plain number."""


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether an op writes to no argument and returns no view of one."""
    schema = func._schema
    return not schema.is_mutable and all(x.alias_info is None for x in schema.returns)


def _key(x: Any) -> Any:
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if not x.is_meta:
            raise _Unknown
        return x.shape, x.stride(), x.dtype
    if kind is list or kind is tuple:
        return kind, tuple([_key(item) for item in x])
    if isinstance(x, torch.Tensor):
        raise _Unknown
    return kind, x  # 1 and 1.0 are equal, and give other dtypes


def run_op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` of an ATen op, several times as fast on the meta device.

    PyTorch has most of its ops on meta tensors in Python, where one takes a fraction of a
    millisecond, and the blocks of a model repeat their shapes. What an op returned for the same
    shapes, strides, dtypes and numbers is made anew. Views, ops that write to an argument, and
    tensors of other devices and of subclasses take the ordinary way.
    """
    if not _makes_new(func):
        return func(*args, **kwargs)
    try:
        named = tuple([(name, _key(x)) for name, x in kwargs.items()])
        key = func, torch.get_default_dtype(), _key(args), named
        known = _known.get(key)
    except (_Unknown, TypeError):  # TypeError: what cannot be hashed
        return func(*args, **kwargs)
    if known is not None:
        made = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in known]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)
    out = func(*args, **kwargs)
    results = out if type(out) is tuple else (out,)
    if all(type(x) is torch.Tensor and x.is_meta for x in results):
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = [(x.shape, x.stride(), x.dtype) for x in results]
    return out


class FlopCounter(TorchDispatchMode):
    """As ``torch.utils.flop_counter.FlopCounterMode``, with :func:`run_op` and less beside it.

    Args:
        tracker: knows which modules run, in order to count for each of them as well.

    Attributes:
        total: FLOPs so far.
        modules: FLOPs by name of module, its children included, in order of their first FLOPs.
    """

    formulas: ClassVar[dict[Any, Any]] = flop_registry  # of the FLOPs of an op
    _basic: ClassVar[set[Any]] = set()  # ops that consist of no others

    def __init__(self, tracker: ModuleTracker | None = None) -> None:
        super().__init__()
        self.total = 0
        self.modules: dict[str, int] = {}
        self._tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and func not in self._basic:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self._basic.add(func)
        out = run_op(func, args, kwargs)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.total += flops
            for name in self._tracker.parents if self._tracker else ():
                self.modules[name] = self.modules.get(name, 0) + flops
        return out
