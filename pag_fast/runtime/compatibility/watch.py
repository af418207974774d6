"""Whether anything on a model has changed since it was looked at, in a fraction of a millisecond.

A model like SDXL's UNet has 1,930 modules. Asking each of them anything in Python takes ten times
as long as letting ``map`` collect what can be compared with the last forward's: children, classes,
forwards, hooks and the kinds of parameters.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from types import MappingProxyType
from typing import Any

from torch import nn

from .functions import code_of, functions_in
from .surroundings import Surroundings

# hooks are sometimes cleared by putting a new dictionary in place of the old one
_before = itemgetter("_forward_pre_hooks")
_after = itemgetter("_forward_hooks")
_forward = attrgetter("forward")
_call = attrgetter("__call__")


class Watch:
    """What can be told of a model in passing, as it was when it was looked at.

    The model itself is not held: it has to be given anew, and dies when its pipeline does.
    """

    def __init__(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
        inner = [module for _, module in modules if module is not model]
        self._inner = inner
        self._owns = [vars(model), *map(vars, inner)]
        self._replaced = [own for own in self._owns if "forward" in own]
        # most modules have no children, or no parameters: that none has come is told at once
        self._children, self._leaves = _parted([module._modules for _, module in modules])
        some, self._bare = _parted([module._parameters for _, module in modules])
        # a bias is never of another kind than its weight
        self._weighted = [parameters for parameters in some if "weight" in parameters]
        self._parameters = [parameters for parameters in some if "weight" not in parameters]
        self._processed = [
            own
            for own, (_, module) in zip(self._owns, modules, strict=True)
            if getattr(module, "processor", None) is not None
        ]
        self._chunked = [own for own in self._owns if "_chunk_size" in own]
        self._note_code([module for _, module in modules])
        self._hooked = [o for o in self._owns if "_diffusers_hook" in o or "_hf_hook" in o]
        self.surroundings = Surroundings(modules)
        self._seen = self._glance(model)

    def _note_code(self, modules: list[nn.Module]) -> None:
        """Note whose code runs: classes, and the modules that these are from."""
        self._kinds: list[Any] = list({type(module): None for module in modules})
        # an id is compared only as long as nothing else can have got it
        self._held = [own.get("processor") for own in self._processed]
        processors = dict.fromkeys(map(type, self._held))
        self._processor_kinds: list[Any] = list(processors)
        mros = [cls.__mro__[:-1] for cls in (*self._kinds, *processors)]
        self._classes = [vars(cls) for cls in dict.fromkeys(chain.from_iterable(mros))]
        self._code = code_of(modules)
        self._functions = self._of_code()

    def changed(self, model: nn.Module) -> bool:
        """Whether there is anything to look at again."""
        return self._glance(model) != self._seen

    def rewritten(self) -> bool:
        """Whether a method of a class, or a function that modules call, is another one now.

        Or a forward has come where something else has gone. It takes as long as all else together,
        so it is asked once a call.
        """
        replaced = sum(map(dict.__contains__, self._owns, repeat("forward")))
        code = self._of_code()
        # what stands in a class may be a tensor, which is not compared by ==
        same = len(code) == len(self._functions) and all(map(is_, code, self._functions))
        return replaced != len(self._replaced) or not same

    def _of_code(self) -> list[Any]:
        methods = chain.from_iterable(map(MappingProxyType.values, self._classes))
        return [*methods, *chain.from_iterable(functions_in(self._code))]

    def _glance(self, model: nn.Module) -> tuple[Any, ...]:
        owns = self._owns
        classes: list[Any] = [type(model), *map(type, self._inner)]
        hooked: list[Any] = []
        if self._hooked:
            hooked = [own.get("_hf_hook") for own in self._hooked]
            registries = [own.get("_diffusers_hook") for own in self._hooked]
            hooked += [tuple(getattr(registry, "hooks", {}).values()) for registry in registries]
        return (
            list(chain.from_iterable(map(dict.values, self._children))),
            any(self._leaves),
            classes,
            # functions put on a class
            list(map(_forward, self._kinds)),
            list(map(_call, self._processor_kinds)),
            # a forward, or a method, that comes to hide the one of the class
            list(map(len, owns)),
            list(map(dict.get, self._replaced, repeat("forward"))),
            list(map(tuple, map(dict.items, filter(None, map(_before, owns))))),
            list(map(tuple, map(dict.items, filter(None, map(_after, owns))))),
            list(map(type, map(dict.get, self._weighted, repeat("weight")))),
            list(map(type, chain.from_iterable(map(dict.values, self._parameters)))),
            any(self._bare),
            # processors may be compared by what they hold
            list(map(id, map(dict.get, self._processed, repeat("processor")))),
            list(map(dict.get, self._chunked, repeat("_chunk_size"))),
            list(map(dict.get, self._chunked, repeat("_chunk_dim"))),
            hooked,
        )


def _parted(dictionaries: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those that hold something, and those that are empty."""
    return [d for d in dictionaries if d], [d for d in dictionaries if not d]
