"""Whose forward this is: the pipeline call on the stack that a model is called from."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

_CALLBACKS = ("callback_on_step_end", "callback")
# of pipelines whose __call__ is a function of another name, such as one that was copied
_LOOPS: set[CodeType] = set()
Inside = dict[CodeType, None]
"""Code that runs inside of a frame."""


def know_loops(cls: type) -> None:
    """Recognise the ``__call__`` of a class of pipelines, whatever its function is called."""
    for base in cls.__mro__:
        code = _code(vars(base).get("__call__"))
        if code is not None and code.co_name != "__call__" and code.co_argcount:
            _LOOPS.add(code)


# whether a class is one of pipelines: every forward asks for the same few
_KINDS: dict[type, bool] = {}
_MOST_KINDS = 256


def _is_pipeline_class(cls: type) -> bool:
    diffusers = sys.modules.get("diffusers")
    if diffusers is None:
        return False
    kinds = [getattr(diffusers, name, None) for name in ("DiffusionPipeline", "ModularPipeline")]
    if len(_KINDS) >= _MOST_KINDS:
        _KINDS.clear()
    _KINDS[cls] = issubclass(cls, tuple(kind for kind in kinds if isinstance(kind, type)))
    return _KINDS[cls]


def running_pipeline(thread: int) -> str:
    """The class of the pipeline that runs in a thread, for errors; empty without one."""
    for pipe, _, _ in _pipeline_calls(sys._current_frames().get(thread)):
        return type(pipe).__name__
    return ""


def _pipeline_calls(frame: FrameType | None) -> Iterator[tuple[Any, FrameType, Inside]]:
    """Every ``__call__`` of a pipeline on the stack, innermost first, and the code inside of it."""
    inside: Inside = {}
    while frame is not None:
        code = frame.f_code
        # every forward looks at all frames between a model and its pipeline: comparisons, no calls
        if code in _LOOPS or (code.co_name == "__call__" and code.co_varnames[:1] == ("self",)):
            local, name = frame.f_locals, code.co_varnames[0]
            if name in local:
                pipe = local[name]
                cls = type(pipe)
                if _KINDS[cls] if cls in _KINDS else _is_pipeline_class(cls):
                    yield pipe, frame, inside
        inside[code] = None
        frame = frame.f_back


class LoopCode(NamedTuple):
    """Which frame of a pipeline's call is that of its denoising loop.

    Attributes:
        code: of the loop that is known; ``None``: whatever runs.
        begins: it has begun once it has a ``t``; what ran in front of that was no part of it.
        others: other code may be a loop, too, but for a ``__call__`` that runs another one.
    """

    code: CodeType | None = None
    begins: bool = False
    others: bool = False


ANYWHERE = LoopCode()


def loop_of(described: type) -> LoopCode:
    """The loop of a class of pipelines, or one that a subclass has put in its place."""
    code = _code(described.__call__)
    return LoopCode(code, begins=code is not None and "t" in code.co_varnames, others=True)


def calling_frame(loop: LoopCode = ANYWHERE) -> tuple[Any, FrameType | None]:
    """The pipeline whose ``__call__`` is innermost on this thread's stack, and that call's frame.

    ``(None, None)`` without one, and where that is not in its loop. A callback that runs the model
    is not the pipeline's loop: its forwards are nobody's.
    """
    for pipe, frame, inside in _pipeline_calls(sys._getframe(1)):
        local, code = frame.f_locals, frame.f_code
        for name in _CALLBACKS:
            callback = local[name] if name in local else None  # noqa: SIM401
            if callback is not None and _code(callback) in inside:
                return None, None
        if code is loop.code:
            if loop.begins and "t" not in local:
                return None, None
        elif loop.code is not None and (not loop.others or "__call__" in code.co_names):
            return None, None
        return pipe, frame
    return None, None


def calling_pipeline() -> Any:
    """The pipeline of :func:`calling_frame`."""
    return calling_frame()[0]


def is_loop_of(cls: type, described: type) -> bool:
    """Whether a class of pipelines has the ``__call__`` of the one that is described."""
    return _code(cls.__call__) is _code(described.__call__)


def diffusers_class(pipe: Any) -> type:
    """The class of diffusers' that a pipeline is of, or inherits from."""
    return next((c for c in type(pipe).__mro__ if _is_diffusers(c.__module__)), type(pipe))


def _is_diffusers(module: Any) -> bool:
    return str(module).partition(".")[0] == "diffusers"


def nobody_writes() -> bool:
    """Whether the loop that calls the model is diffusers' own, and calls nobody back.

    Nobody can write into its tensors then, between two of its forwards; the scheduler could.
    """
    for pipe, frame, _ in _pipeline_calls(sys._getframe(1)):
        modules = frame.f_globals.get("__name__"), type(getattr(pipe, "scheduler", None)).__module__
        own = all(map(_is_diffusers, modules))
        local = frame.f_locals
        callbacks = [local[name] for name in _CALLBACKS if name in local]
        return own and bool(callbacks) and callbacks.count(None) == len(callbacks)
    return False


def equal_by_construction() -> bool:
    """Whether branches begin with equal latents and timesteps because one row is copied for all.

    Diffusers' loops do so. A loop of somebody else's, or his scheduler's ``scale_model_input``,
    may tell them apart in any step.
    """
    for pipe, frame, _ in _pipeline_calls(sys._getframe(1)):
        scaled = getattr(getattr(pipe, "scheduler", None), "scale_model_input", None)
        codes = [frame, getattr(scaled, "__func__", scaled)]
        scopes = [getattr(x, "f_globals", getattr(x, "__globals__", {})) for x in codes if x]
        return all(_is_diffusers(scope.get("__name__")) for scope in scopes)
    return False


def _code(callback: Any) -> CodeType | None:
    while isinstance(callback, functools.partial):
        callback = callback.func
    function = callback
    if not hasattr(inspect.unwrap(callback), "__code__"):
        function = getattr(type(callback), "__call__", None)  # noqa: B004
    return getattr(inspect.unwrap(function), "__code__", None) if function is not None else None


def call_arguments(pipe: Any, described: Any) -> dict[str, Any] | None:
    """The locals of the running ``__call__`` of ``described``, the class that is described.

    That is right for a subclass that calls ``super()`` or ``Base.__call__(self, …)`` with whatever
    arguments, and for defaults. ``None`` where that code does not run: a loop of the user's own.
    """
    code = _code(described.__call__)
    for found, frame, _ in _pipeline_calls(sys._getframe(1)):
        if found is pipe and frame.f_code is code:
            return dict(frame.f_locals)
    return None
