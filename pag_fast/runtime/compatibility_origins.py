"""Whose code runs when a module is called: classes, replaced forwards, hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

from ..sharing.replacement import Replacement

# packages whose modules compute each row of a batch from that row alone
TRUSTED = frozenset({"accelerate", "diffusers", "pag_fast", "peft", "torch", "transformers"})
# their layers do too, with weights of a format of their own
QUANTIZERS = frozenset(
    {
        "auto_round",
        "autoawq",
        "aqlm",
        "awq",
        "bitsandbytes",
        "eetq",
        "gguf",
        "gptqmodel",
        "hqq",
        "modelopt",
        "nunchaku",
        "optimum",
        "quanto",
        "sdnq",
        "torchao",
    }
)
COMPILED = "torch.compile"
OBSERVES = "pag_fast_observes"
"""A hook or forward with this attribute set only looks: rows may be shared beneath it."""
MIXED_PRECISION = "mixed precision"
_PASSIVE = frozenset({"__init__", "__repr__", "__str__", "extra_repr"})


def origin(function: Any) -> str:
    """The module in which the code of a callable was written, whatever it pretends to be.

    ``functools.wraps`` copies ``__module__``, so a wrapper's own globals count.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType):
        if isinstance(function, type) or not callable(function):
            return str(getattr(function, "__module__", ""))
        cls: Any = type(function)
        function = cls.__call__
    names = getattr(function, "__globals__", None)
    return str(getattr(function, "__module__", "") if names is None else names.get("__name__", ""))


def package(name: str) -> str:
    """The package of a module, by its dotted name."""
    return name.partition(".")[0] or "an unnamed module"


def foreign_class(cls: type) -> str:
    """The package that gives a class behaviour of its own, if it is none that is trusted."""
    return _foreign_class(cast(Any, cls), cls.__dict__.get("forward"))


@functools.lru_cache(maxsize=4096)
def _foreign_class(cls: Any, forward: Any) -> str:
    for base in inspect.getmro(cls):
        known = TRUSTED | {"builtins", "abc", "collections", "typing", "enum"}
        if package(base.__module__) not in known:
            functions = [n for n, f in vars(base).items() if isinstance(f, FunctionType)]
            if any(name not in _PASSIVE for name in functions):
                return package(base.__module__)
    # a function put on a class of somebody else's
    for name in ("forward", "__call__"):
        function = getattr(cls, name, None)
        while function is not None:
            if isinstance(function, FunctionType) and package(origin(function)) not in TRUSTED:
                return package(origin(function))
            function = getattr(function, "__wrapped__", None)
    return ""


def forward_origins(module: nn.Module) -> Iterator[str]:
    """Who has wrapped a module's forward, from the outside in.

    Replacements of pag_fast's own are passed over, and so are the wrappers of hook registries
    whose hooks are looked at by themselves.
    """
    own = vars(module)
    forward: Any = own.get("forward")
    registry = getattr(own.get("_diffusers_hook"), "_fn_refs", ())
    references, old = list(registry), own.get("_old_forward")
    while forward is not None and not _is_own(module, forward):
        compiled = getattr(forward, "_torchdynamo_orig_callable", None)
        where = origin(forward)
        if getattr(forward, OBSERVES, False):
            return
        if isinstance(forward, Replacement):
            forward = forward.original
        elif compiled is not None:
            yield COMPILED
            forward = compiled
        elif where == "diffusers.hooks.hooks" and references:
            reference = references.pop()
            forward = reference.original_forward or reference.forward
        elif where == "accelerate.hooks" and old is not None:
            forward, old = old, None
        elif where.startswith(("torch.amp", "accelerate.utils")):
            yield MIXED_PRECISION
            forward = own.get("_original_forward")
        else:
            if package(where) != "pag_fast":
                yield package(where)
            return


def _is_own(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a forward is that of one of the module's classes, bound to it."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return any(vars(c).get("forward") is forward.__func__ for c in type(module).__mro__)


def mro_names(cls: type) -> frozenset[str]:
    """Names of a class and its bases: FSDP and parametrizations derive classes of their own."""
    return frozenset(base.__name__ for base in cls.__mro__)
