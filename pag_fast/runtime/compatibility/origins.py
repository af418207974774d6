"""Whose code runs when a module is called: classes, replaced forwards, hooks."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from torch import nn

from ...sharing.replacement import Replacement

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
MIXED_PRECISION = "mixed precision"
_STANDARD = frozenset({"builtins", "abc", "collections", "typing", "enum"})
# what the trusted import for files, versions and words, not for rows
_IMPORTED = frozenset({"huggingface_hub", "packaging", "safetensors", "tqdm", "typing_extensions"})
# decorators of the standard library wrap what is looked at behind them
_PASSED_ON = TRUSTED | _IMPORTED | sys.stdlib_module_names
_PASSIVE = frozenset({"__init__", "__repr__", "__str__", "extra_repr", "to", "cuda", "cpu"})
_SETTERS = ("set_", "from_", "save_", "load_", "push_to_hub", "enable_", "disable_")
# forwards and calls are looked at by themselves
_LOOKED_AT = frozenset({"forward", "processor", "_compiled_call_impl"})

T = TypeVar("T")
# not an attribute, which functools.wraps would hand on to wrappers; by id, as what is equal is not
# the same, and some things have no hash
_ROW_WISE: WeakValueDictionary[int, Any] = WeakValueDictionary()


def row_wise(thing: T) -> T:
    """Say of a hook, forward, processor or class that it treats every row by itself.

    What is marked so, before it is put on a model, does not keep branches from being shared: it
    depends on no other row of the batch, keeps nothing from one forward to the next that has the
    batch's size, and leaves weights alone. Counting and timing are examples. A hook or forward on
    the way of the prompt does the same in every step, as what is computed of that alone is kept.

    Returns:
        ``thing`` itself, so that it can decorate.

    Raises:
        ValueError: something that cannot be remembered without keeping it alive.
    """
    marked = getattr(thing, "__func__", thing)
    try:
        _ROW_WISE[id(marked)] = marked
    except TypeError:
        name = type(marked).__name__
        raise ValueError(
            f"row_wise takes what can be referred to weakly, and an object of {name} cannot: mark "
            f"its class, row_wise({name}), or add '__weakref__' to its __slots__."
        ) from None
    return thing


def is_row_wise(thing: Any) -> bool:
    """Whether :func:`row_wise` has been said of it, or of its class."""
    thing = getattr(thing, "__func__", thing)
    return _is_marked(thing) or _is_marked(type(thing))


def _is_marked(thing: Any) -> bool:
    return _ROW_WISE.get(id(thing)) is thing


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
    if _is_marked(cls):
        return ""
    for base in inspect.getmro(cls):
        where = package(base.__module__)
        if where in _STANDARD:
            continue
        for name, function in vars(base).items():
            if not isinstance(function, FunctionType) or runs_in_no_forward(name):
                continue
            # one that somebody has put on a class of somebody else's counts, too
            who = where if where not in TRUSTED else foreign_function(function)
            if who:
                return who
    return ""


def runs_in_no_forward(name: str) -> bool:
    """Whether a method of that name is for settings, files or words."""
    return name in _PASSIVE or name.startswith(_SETTERS)


def foreign_function(function: Any) -> str:
    """The package of a function, or of one that it wraps, if it is none that is trusted."""
    while function is not None:
        if isinstance(function, (FunctionType, MethodType, functools.partial)):
            who = package(origin(function))
            if who not in _PASSED_ON and not is_row_wise(function):
                return who
        function = getattr(function, "__wrapped__", None)
    return ""


def foreign_methods(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Methods of a module's class that something on the instance hides, and whose code that is."""
    cls: Any = type(module)
    for name, value in vars(module).items():
        if name in _LOOKED_AT or runs_in_no_forward(name) or not callable(value):
            continue
        if callable(getattr(cls, name, None)) and not is_row_wise(value):
            who = package(origin(value))
            if who not in TRUSTED:
                yield name, who


def forward_origins(module: nn.Module) -> Iterator[str]:
    """Who has wrapped a module's forward, from the outside in.

    Replacements of pag_fast's own are passed over, and so are the wrappers of hook registries
    whose hooks are looked at by themselves.
    """
    own = vars(module)
    forward: Any = own.get("forward")
    registry = getattr(own.get("_diffusers_hook"), "_fn_refs", ())
    references, old = list(registry), own.get("_old_forward")
    while not (forward is None or _is_own(module, forward) or is_row_wise(forward)):
        compiled = getattr(forward, "_torchdynamo_orig_callable", None)
        where = origin(forward)
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
