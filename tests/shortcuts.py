"""A way round what Triton's interpreter does again and again, to the same results."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np


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


def listed_once(interpreter: Any) -> Callable[[Any], Any]:
    """``_get_np_dtype`` that does not make the table of all dtypes for every op."""
    language, own = interpreter.tl, interpreter._get_np_dtype
    known: dict[Any, Any] = {}

    @functools.wraps(own)
    def get(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        if isinstance(element, language.pointer_type):
            return own(dtype)
        found = known.get(element)
        if found is None:
            found = known[element] = own(element)
        return found

    return get


def checked_in_numpy(interpreter: Any) -> Callable[[Any, Any, Any, Any], None]:
    """The check of integers for overflow, which the interpreter computes in eight ops of its own.

    It does so for every sum and product of offsets, and says nothing unless Triton debugs.
    """
    own = interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl.__func__
    in_numpy = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    @functools.wraps(own)
    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        operands = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
        exact = in_numpy[binary_op.__name__](*operands)
        inside = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
        assert inside, (
            f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"
        )

    return check


def take() -> None:
    """Put the ways round in place where the interpreter has been imported, and is one we know."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patched_once(interpreter)
        interpreter._get_np_dtype = listed_once(interpreter)
        semantic = interpreter.interpreter_semantic
        semantic.binary_op_sanitize_overflow_impl = types.MethodType(
            checked_in_numpy(interpreter), semantic
        )
