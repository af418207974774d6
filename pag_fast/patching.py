"""Putting pag_fast onto one pipeline, and taking it off again.

A patched pipeline is an instance of a subclass of its own class, made on the fly: ``patch`` changes
``pipe.__class__`` and adds one attribute, nothing else. Python looks ``pipe(...)`` up on the class,
so this is the only way to know, whatever happens inside a call, that the call has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from .config import PatchConfig
from .families import SAG_PIPELINES, SUPPORTED_PIPELINES, denoiser_name, family_of, uncompiled
from .lasting import Patch
from .layers import Layers, as_list, resolve
from .pipeline import mixins
from .sag import SagPatch, is_sag

P = TypeVar("P")


def patch(pipe: P, layers: Layers | None = None, **options: Any) -> P:
    """Make a diffusers PAG or SAG pipeline fast; the picture stays the same.

    Args:
        pipe: an instance of one of :func:`supported_pipelines`. Only this instance changes.
            Patching it again replaces the earlier settings.
        layers: attention layers to perturb, e.g. ``"mid"``, ``["blocks.13"]``, ``13``, ``"u0.4"``;
            omitted, the pipeline's own ``pag_applied_layers``. See :mod:`pag_fast.layers`.
            Self-Attention Guidance has none.
        **options: the other fields of :class:`PatchConfig`, or ``config=PatchConfig(...)``.

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: not a supported pipeline, a layer that does not exist, an unknown option. The
            pipeline is then as it was.
    """
    config = _config(layers, options)
    _check_pipeline(pipe)
    if is_sag(pipe):
        return _put_on(pipe, SagPatch(pipe, config))
    denoiser = uncompiled(getattr(pipe, denoiser_name(pipe)))
    family_of(denoiser)
    original = _users_layers(pipe)
    wanted = list(original) if config.layers is None else as_list(config.layers)
    resolve(denoiser, wanted, exact=config.exact_layers)

    before = getattr(pipe, "_pag_fast", None)
    if before is not None:
        before.release()
    own = None if config.layers is None else wanted
    new = Patch(config, type(pipe) if before is None else before.original_class, original, own)
    new.compile(pipe)
    _put_on(pipe, new)
    if own is not None:
        pipe.pag_applied_layers = own  # type: ignore[attr-defined]
    return pipe


def _put_on(pipe: P, new: Patch | SagPatch) -> P:
    unpatch(pipe)
    pipe._pag_fast = new  # type: ignore[attr-defined]
    pipe.__class__ = _subclass(cast(Any, type(pipe)))
    return pipe


def unpatch(pipe: P) -> P:
    """Undo :func:`patch`: the pipeline has its class, layers and processors back.

    Layers that were set after patching, with ``set_pag_applied_layers``, are kept. A pipeline that
    is not patched is returned as it is.
    """
    found = getattr(pipe, "_pag_fast", None)
    if found is None:
        return pipe
    if hasattr(pipe, "pag_applied_layers"):
        pipe.pag_applied_layers = _users_layers(pipe)
    found.release()
    pipe.__class__ = found.original_class
    del pipe._pag_fast  # type: ignore[attr-defined]
    return pipe


@contextmanager
def patched(pipe: P, layers: Layers | None = None, **options: Any) -> Iterator[P]:
    """:func:`patch` for the duration of a ``with`` block; earlier settings come back after it."""
    before = getattr(pipe, "_pag_fast", None)
    layers_before = getattr(pipe, "pag_applied_layers", None)
    patch(pipe, layers, **options)
    try:
        yield pipe
    finally:
        unpatch(pipe)
        if before is not None:
            pipe.__class__ = _subclass(before.original_class)
            pipe._pag_fast = before  # type: ignore[attr-defined]
            if layers_before is not None:
                pipe.pag_applied_layers = layers_before  # type: ignore[attr-defined]


def supported_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that :func:`patch` takes, where diffusers has them."""
    import diffusers

    names = (*SUPPORTED_PIPELINES, *SAG_PIPELINES)
    return tuple(name for name in names if hasattr(diffusers, name))


def _config(layers: Layers | None, options: dict[str, Any]) -> PatchConfig:
    config = options.pop("config", None)
    known = [field.name for field in fields(PatchConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown option {name!r}: choose from {', '.join(known)}.")
    if config is None:
        return PatchConfig(layers=layers, **options)
    if not isinstance(config, PatchConfig):
        raise ValueError(f"config must be a PatchConfig; got {type(config).__name__}.")
    if layers is not None:
        options["layers"] = layers
    return replace(config, **options)


def _users_layers(pipe: Any) -> Any:
    """The layers the pipeline has without those that a patch chose for it."""
    found = getattr(pipe, "_pag_fast", None)
    if found is not None and pipe.pag_applied_layers is found.own_layers:
        return found.original_layers
    return pipe.pag_applied_layers


def _check_pipeline(pipe: Any) -> None:
    names = {cls.__name__ for cls in type(pipe).__mro__}
    if not names & {*SUPPORTED_PIPELINES, *SAG_PIPELINES}:
        raise ValueError(
            f"{type(pipe).__name__} is not a pipeline that pag_fast can patch. It takes the PAG "
            f"pipelines of diffusers: {', '.join(SUPPORTED_PIPELINES)}; AutoPipelineForText2Image"
            ".from_pretrained(..., enable_pag=True) makes one. It also takes "
            f"{', '.join(SAG_PIPELINES)}."
        )


@functools.cache
def _subclass(cls: Any) -> Any:
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._pag_fast.call(self, functools.partial(cls.__call__, self), args, kwargs)

    body = {
        "__call__": call,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    # under the same name: diffusers saves pipelines and finds related ones by class name
    return type(cls.__name__, (*mixins(cls), cls), body)
