"""What is known about a model: the descriptions of this package, found by class name.

A file in this package describes one class of denoisers. To add one is to add a file that defines
``DESCRIPTION``, or ``CONTROLNET``.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from .description import ControlNetDescription, ModelDescription

UNCOND, COND, PERTURBED = "uncond", "cond", "perturbed"
"""The branches of a batch, in their order."""


class Named(Protocol):
    """A description of the class that it names."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def described(package: str, names: Sequence[str], *, others: Iterable[str]) -> Iterator[Any]:
    """What the modules of a package define under one of ``names``.

    Every module has to define one, except for those that are named in ``others``.
    """
    for found in pkgutil.iter_modules(import_module(package).__path__):
        if found.name in others:
            continue
        module = import_module(f"{package}.{found.name}")
        values = [getattr(module, name) for name in names if hasattr(module, name)]
        if not values:
            raise ImportError(f"{module.__name__} defines neither {' nor '.join(names)}.")
        yield from values


def along_mro(cls: type, entries: Iterable[N]) -> N | None:
    """The entry that names a class, or else the nearest of its bases."""
    known = {entry.name: entry for entry in entries}
    return next((known[base.__name__] for base in cls.__mro__ if base.__name__ in known), None)


_OTHERS = ("description", "inputs", "layer_names", "registry", "tensors", "traced", "unets")
_ALL = tuple(described(__package__, ("DESCRIPTION", "CONTROLNET"), others=_OTHERS))

DESCRIPTIONS = tuple(entry for entry in _ALL if isinstance(entry, ModelDescription))
"""Of all denoisers."""

CONTROLNETS = tuple(entry for entry in _ALL if isinstance(entry, ControlNetDescription))
"""Of all ControlNets."""


_TRACED: WeakKeyDictionary[nn.Module, ModelDescription] = WeakKeyDictionary()


def keep_traced(model: nn.Module, description: ModelDescription) -> None:
    """Have ``model`` described like this as long as it lives: its class is not, or not entirely."""
    _TRACED[model] = description


def find(model: nn.Module) -> ModelDescription | None:
    """The description of a denoiser's class, or of itself; ``None`` for one that is not known."""
    return _TRACED.get(model) or along_mro(type(model), DESCRIPTIONS)


def is_derived(model: nn.Module) -> bool:
    """Whether a model's description was seen: then no more is done to it than to share branches."""
    found = find(model)
    return found is not None and found.is_derived


def find_controlnet(model: nn.Module) -> ControlNetDescription | None:
    """The description of a ControlNet's class; ``None`` for one that is not known."""
    return along_mro(type(model), CONTROLNETS)


def describe(model: nn.Module) -> ModelDescription:
    """The description of a denoiser's class.

    Raises:
        ValueError: a class that none of the supported pipelines uses.
    """
    found = find(model)
    if found is None:
        names = ", ".join(entry.name for entry in DESCRIPTIONS)
        raise ValueError(f"{type(model).__name__} is none of the supported denoisers: {names}.")
    return found


family_of = describe


def fusable_processors(model: nn.Module) -> frozenset[str]:
    """Class names of the processors of a model whose projections may be views of one product."""
    denoiser, net = find(model), find_controlnet(model)
    if denoiser is not None:
        return denoiser.fusable_processors | set(denoiser.stock_processors or ())
    return frozenset() if net is None else net.fusable_processors


@functools.cache
def stock_pag_processors() -> frozenset[type]:
    """Classes of the processors that PAG pipelines of diffusers put on a model while they run."""
    import diffusers.models.attention_processor as processors

    names = {name for entry in DESCRIPTIONS for name in entry.stock_processors or ()}
    return frozenset(getattr(processors, name) for name in names)


def repeated_blocks(cls: type) -> frozenset[str]:
    """Class names of the blocks that models of ``cls`` repeat: diffusers' own, or described.

    The names of all base classes count: a subclass may name its own and inherit other blocks.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base).get("_repeated_blocks") or ())
    model, controlnet = along_mro(cls, DESCRIPTIONS), along_mro(cls, CONTROLNETS)
    names.update(() if model is None else model.blocks)
    names.update(() if controlnet is None else controlnet.blocks)
    return frozenset(names)


def uncompiled(module: Any) -> Any:
    """The module itself, where ``torch.compile(module)`` has wrapped it."""
    return getattr(module, "_orig_mod", module)


def has_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` has wrapped the module, or a net of a ``MultiControlNetModel``."""
    inner = uncompiled(module)
    nets = getattr(inner, "nets", ())
    return inner is not module or any(uncompiled(net) is not net for net in nets)


def denoiser_name(pipe: Any) -> str:
    """``"unet"`` or ``"transformer"``: the attribute of ``pipe`` that holds its denoiser.

    Raises:
        ValueError: a pipeline with neither.
    """
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer.")


def controlnets(controlnet: Any) -> Iterable[nn.Module]:
    """The nets of a ``ControlNetModel`` or a ``MultiControlNetModel``."""
    controlnet = uncompiled(controlnet)
    return [uncompiled(net) for net in getattr(controlnet, "nets", [controlnet])]
