"""What is known about a pipeline: the descriptions of this package, found by class name.

A file in this package describes the pipelines of one family of models. To add some is to add a file
that defines ``PIPELINES``.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from ..models.registry import DESCRIPTIONS, along_mro, denoiser_name, described, uncompiled
from ..models.traced.description import derive
from .description import PipelineDescription
from .observed import observed_pipeline

_OTHERS = ("description", "observed", "registry")
PIPELINES: tuple[PipelineDescription, ...] = tuple(
    entry for family in described(__package__, ("PIPELINES",), others=_OTHERS) for entry in family
)


def _names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in PIPELINES if entry.kind == kind))


PAG_PIPELINES, SAG_PIPELINES, STOCK_PIPELINES = _names("pag"), _names("sag"), _names("stock")
HOSTS = {name: entry for name in _names("injected") for entry in PIPELINES if entry.name == name}
"""Pipelines without PAG of their own."""


_OBSERVED: WeakKeyDictionary[type, PipelineDescription] = WeakKeyDictionary()


def description_of(cls: type) -> PipelineDescription | None:
    """The description of a class of pipelines; ``None`` for one that is not known."""
    found = along_mro(cls, PIPELINES)
    if found is None:
        return next((_OBSERVED[base] for base in cls.__mro__ if base in _OBSERVED), None)
    has_pag = any(base.__name__ == "PAGMixin" for base in cls.__mro__)
    # a PAG pipeline that nobody has described must not get PAG a second time
    return None if found is not None and found.kind == "injected" and has_pag else found


def _described(pipe: Any) -> PipelineDescription | None:
    """The description by which a pipeline is patched, or else that of its class."""
    host: PipelineDescription | None = getattr(getattr(pipe, "_pag_fast", None), "host", None)
    return description_of(type(pipe)) if host is None else host


def describe_pipeline(pipe: Any) -> PipelineDescription:
    """The description of a pipeline; one that nobody has written is made here.

    Raises:
        ValueError: a pipeline that cannot be patched.
    """
    return _completed(pipe, _described(pipe))


def described_with(pipe: Any, *, perturbs: bool) -> PipelineDescription:
    """The description by which a pipeline is to be patched, whatever it is patched by now.

    A pipeline whose own guidance alone is made fast gets PAG, too, if it is asked for
    (``perturbs``): its passes are then observed.

    Raises:
        ValueError: a pipeline that cannot be patched.
    """
    found = _completed(pipe, description_of(type(pipe)))
    if found.kind == "stock" and perturbs:
        observed = observed_pipeline(pipe)
        return _with_models(pipe, replace(observed, stock_guidance=found.stock_guidance))
    return found


def _completed(pipe: Any, found: PipelineDescription | None) -> PipelineDescription:
    if found is not None and any(getattr(pipe, x, None) is not None for x in found.denoisers):
        return _with_models(pipe, found)
    try:
        found = observed_pipeline(pipe)
    except ValueError as error:
        raise ValueError(
            f"{type(pipe).__name__} is not a pipeline that pag_fast can patch: the nearest that it "
            f"can is {_nearest(pipe)}, and pag_fast.supported_pipelines() names all."
        ) from error
    home = next(base for base in type(pipe).__mro__ if base.__name__ == found.name)
    _OBSERVED[home] = found
    return _with_models(pipe, found)


def _with_models(pipe: Any, found: PipelineDescription) -> PipelineDescription:
    """``found``, where every denoiser that gets PAG has a description, too.

    Raises:
        ValueError: a denoiser of an unknown class that has no attention to perturb.
    """
    models = [getattr(pipe, name, None) for name in found.denoisers]
    for model in models if found.kind == "injected" else ():
        if model is not None:
            derive(uncompiled(model))
    return found


def _nearest(pipe: Any) -> str:
    """The described pipeline that is most like ``pipe``: with its denoiser, where one has that."""
    denoisers = [uncompiled(getattr(pipe, part, None)) for part in ("transformer", "unet")]
    models = [along_mro(type(model), DESCRIPTIONS) for model in denoisers]
    with_it = {made.pipeline for model in models if model for made in model.checkpoints}
    names = [entry.name for entry in PIPELINES if with_it & {entry.name, entry.base}]
    names = names or [entry.name for entry in PIPELINES]
    return difflib.get_close_matches(type(pipe).__name__, names, 1, 0.0)[0]


def host_of(pipe: Any) -> PipelineDescription | None:
    """The description of a pipeline without PAG; ``None`` for any other."""
    found = _described(pipe)
    return found if found is not None and found.kind == "injected" else None


def has_layers(pipe: Any) -> bool:
    """Whether a pipeline has, or gets, layers to perturb: Self-Attention Guidance has none."""
    found = _described(pipe)
    return found is None or found.kind in ("pag", "injected")


def denoiser_names(pipe: Any) -> tuple[str, ...]:
    """The attributes of ``pipe`` that hold its denoisers."""
    found = _described(pipe)
    if found is None:
        return (denoiser_name(pipe),)
    return tuple(name for name in found.denoisers if getattr(pipe, name, None) is not None)
