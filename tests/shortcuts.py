"""Ways round what Triton's interpreter and diffusers do again and again, to the same results."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.hooks import HookRegistry
from diffusers.models import modeling_utils


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


_REGISTRIES: weakref.WeakSet[Any] = weakref.WeakSet()  # of hooks, all that are alive


def noted(cls: type, *_: Any, **__: Any) -> Any:
    """``HookRegistry.__new__``, by which copies come into being, too: one more is alive."""
    made = object.__new__(cls)
    _REGISTRIES.add(made)
    return made


def is_hooked(model: torch.nn.Module) -> bool:
    """Whether a module of ``model`` has a hook of diffusers'."""
    if not _REGISTRIES:
        return False
    rest, seen = [model], set()
    while rest:
        module = rest.pop()
        if "_diffusers_hook" in vars(module):
            return True
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                rest.append(child)
    return False


def without_hooks(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_get_top_level_group_offload_hook``, which a pipeline asks seven times in a call.

    ``hasattr`` of a module that has no such attribute raises an error and catches it.
    """

    @functools.wraps(own)
    def get(model: torch.nn.Module) -> Any:
        return own(model) if is_hooked(model) else None

    return get


def dtype_without_hooks(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``get_parameter_dtype``, which asks every module, too."""

    @functools.wraps(own)
    def get(model: Any) -> Any:
        # what an older torch traces cannot look into weak references
        tracing = torch.compiler.is_compiling()
        if isinstance(model, torch.nn.Module) and not tracing and not is_hooked(model):
            apart = getattr(model, "_keep_in_fp32_modules", None) or ()
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point() and not any(part in name for part in apart):
                    return parameter.dtype
        return own(model)

    return get


def _diffusers() -> None:
    HookRegistry.__new__ = noted  # type: ignore[method-assign,assignment]
    for module, name, shorter in (
        (modeling_utils, "get_parameter_dtype", dtype_without_hooks),
        (group_offloading, "_get_top_level_group_offload_hook", without_hooks),
    ):
        if hasattr(module, name):
            setattr(module, name, shorter(getattr(module, name)))


def take() -> None:
    """Put the ways round in place; Triton's where it is imported, and an interpreter we know."""
    _diffusers()
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patched_once(interpreter)
        interpreter._get_np_dtype = listed_once(interpreter)
        semantic = interpreter.interpreter_semantic
        semantic.binary_op_sanitize_overflow_impl = types.MethodType(
            checked_in_numpy(interpreter), semantic
        )
