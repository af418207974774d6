"""The class of a patched pipeline: its own, with a call that begins and ends a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def subclass(
    cls: Any, own: Callable[..., Any], mixed_in: tuple[type, ...], reduce: Callable[..., Any]
) -> Any:
    """A class that its pipelines take for ``cls``, made once for each ``own``.

    Others put functions on ``type(pipe)``, as caches do with ``__call__``, and mean all pipelines
    of that class, now and later. So whatever is set on the class made here, or deleted, is set on
    ``cls``, and ours stays in front of it.

    Args:
        cls: a class of pipelines.
        own: its ``__call__`` as it is now, for calls that are not ours to follow.
        mixed_in: classes whose methods go in front of those of ``cls``.
        reduce: its ``__reduce_ex__``.
    """

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not made or self._pag_fast.passes_on():
            return own(self, *args, **kwargs)
        return self._pag_fast.call(self, functools.partial(_behind, self, cls, own), args, kwargs)

    raw = getattr(own, "__wrapped__", None)
    if raw is not None:

        @functools.wraps(raw)
        def undecorated(self: Any, *args: Any, **kwargs: Any) -> Any:
            # whoever wants gradients calls what diffusers has decorated with no_grad
            if type(self) is not made:
                return raw(self, *args, **kwargs)
            return self._pag_fast.call(self, functools.partial(raw, self), args, kwargs)

        call.__wrapped__ = undecorated

    def set_attribute(_: Any, name: str, value: Any) -> None:
        setattr(cls, name, own if value is call else value)

    def delete_attribute(_: Any, name: str) -> None:
        delattr(cls, name)

    body = {
        "__call__": call,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
    }
    methods = {"__setattr__": set_attribute, "__delattr__": delete_attribute}
    kind: Any = type(type(cls).__name__, (type(cls),), methods)
    # under the same name: diffusers saves pipelines and finds related ones by class name
    made = kind(cls.__name__, (*mixed_in, cls), body)
    return made


def _behind(pipe: Any, cls: Any, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The call of ``cls``, which somebody may have wrapped since: ours is within the wrapper."""
    now = cls.__call__
    if now is own:
        return own(pipe, *args, **kwargs)
    with pipe._pag_fast.wrapped():
        return now(pipe, *args, **kwargs)
