"""A way round what Triton's interpreter does again and again, to the same results."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def patched_once(interpreter: Any) -> Callable[[Any], Any]:
    """``_patch_lang`` that leaves alone what is replaced already around the running kernel.

    The interpreter replaces Triton's language for a kernel, and once more for every call of a
    function in it, which takes a third of its time.
    """
    language, own = interpreter.tl, interpreter._patch_lang
    replaced: list[set[int]] = []  # of the kernel that runs, if one does

    @functools.cache
    def needed(function: Any) -> frozenset[int]:
        modules = (language, language.core)
        found = function.__globals__.values()
        return frozenset(id(module) for module in modules if any(x is module for x in found))

    @functools.wraps(own)
    def patch(function: Any) -> Any:
        if replaced and needed(function) <= replaced[0]:
            return interpreter._LangPatchScope()
        scope = own(function)
        if replaced:
            replaced[0] |= needed(function)
            return scope
        replaced.append(set(needed(function)))
        restore = scope.restore

        def close() -> None:
            replaced.clear()
            restore()

        scope.restore = close
        return scope

    return patch


def take() -> None:
    """Put the way round in place where the interpreter has been imported, and is one we know."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patched_once(interpreter)
