"""Whether anything on a model has changed since it was looked at, in a fraction of a millisecond.

A model like SDXL's UNet has 1,930 modules. Asking each of them anything in Python takes ten times
as long as letting ``map`` collect what can be compared with the last forward's: children, classes,
forwards, hooks and the kinds of parameters.
"""

from __future__ import annotations

import inspect
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from types import MappingProxyType
from typing import Any

from torch import nn

from .functions import code_of, functions_in
from .origins import runs_in_no_forward
from .surroundings import Surroundings

# hooks are sometimes cleared by putting a new dictionary in place of the old one
_before = itemgetter("_forward_pre_hooks")
_after = itemgetter("_forward_hooks")
_forward = attrgetter("forward")
_call = attrgetter("__call__")
# compared by themselves
_LOOKED_AT = frozenset({"forward", "processor"})


class Watch:
    """What can be told of a model in passing, as it was when it was looked at.

    The model itself is not held: it has to be given anew, and dies when its pipeline does.
    """

    def __init__(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
        every = [module for _, module in modules]
        inner = [module for module in every if module is not model]
        self._inner = inner
        self._owns = [vars(model), *map(vars, inner)]
        self._replaced = [own for own in self._owns if "forward" in own]
        # most modules have no children, or no parameters: that none has come is told at once
        self._children, self._leaves = _parted([module._modules for module in every])
        some, self._bare = _parted([module._parameters for module in every])
        # a bias is never of another kind than its weight
        self._weighted = [parameters for parameters in some if "weight" in parameters]
        self._parameters = [parameters for parameters in some if "weight" not in parameters]
        self._processed = [
            own
            for own, module in zip(self._owns, every, strict=True)
            if getattr(module, "processor", None) is not None
        ]
        self._chunked = [own for own in self._owns if "_chunk_size" in own]
        self._note_code(every)
        self._hooked = [o for o in self._owns if "_diffusers_hook" in o or "_hf_hook" in o]
        self._note_methods(every)
        self.surroundings = Surroundings(modules)
        self._seen = self._glance(model)

    def _note_methods(self, modules: list[nn.Module]) -> None:
        """Note what can be called on instances, and what somebody else has written there.

        There is normally none of it but processors, so that a forward has nothing to compare.
        """
        self._callables = self._callable()
        self._methods: list[Any] = []
        self._names: list[str] = []
        for own in self._owns:
            named = [name for name in _callables(own) if name not in _LOOKED_AT]
            self._methods += [own] * len(named)
            self._names += named
        # one of these may go and a method come, and there are as many attributes as before
        known = {cls: _attributes_of(cls) for cls in self._kinds}
        pairs = zip(self._owns, modules, strict=True)
        self._written = [own for own, m in pairs if not own.keys() <= known[type(m)]]

    def _callable(self) -> list[Any]:
        model, *inner = self._owns
        found = filter(callable, chain.from_iterable(map(dict.values, inner)))
        return [*map(model.get, _callables(model)), *found]

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
        """Whether a method of a class or an instance, or a function that modules call, is another.

        It takes three times as long as all else together, so it is asked once a call.
        """
        return not (
            _same(self._of_code(), self._functions)
            # a forward, or a method, that has come where something else has gone, among them
            and _same(self._callable(), self._callables)
        )

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
            list(map(id, map(dict.get, self._methods, self._names))),
            list(map(tuple, self._written)),
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


def _callables(own: dict[str, Any]) -> list[str]:
    """Names of what can be called in the dictionary of an instance, and may run in a forward.

    An entry of ours, which comes and goes, is not among it.
    """
    found = [name for name, value in own.items() if callable(value)]
    return [n for n in found if n != "_compiled_call_impl" and not runs_in_no_forward(n)]


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects; there may be tensors, which have no ``==``."""
    return len(now) == len(before) and all(map(is_, now, before))


def _attributes_of(cls: type) -> frozenset[str]:
    """What the code of a class and its bases names: attributes that it writes, among others."""
    names: set[str] = set()
    for value in chain.from_iterable(vars(base).values() for base in cls.__mro__):
        function = inspect.unwrap(value) if inspect.isfunction(value) else None
        code = getattr(function, "__code__", None)
        if code is not None:
            # torch writes some by super().__setattr__("name", ...)
            names.update(code.co_names, (x for x in code.co_consts if isinstance(x, str)))
    return frozenset(names)


def _parted(dictionaries: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those that hold something, and those that are empty."""
    return [d for d in dictionaries if d], [d for d in dictionaries if not d]
