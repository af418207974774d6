"""Putting pag_fast onto one pipeline, and taking it off again.

A patched pipeline is an instance of a subclass of its own class, made on the fly: ``patch`` changes
``pipe.__class__`` and adds one attribute, nothing else. Python looks ``pipe(...)`` up on the class,
so this is the only way to know, whatever happens inside a call, that the call has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from .config import PatchConfig
from .mixins import mixins
from .models.layer_names import no_default
from .models.registry import family_of, uncompiled
from .parallel.options import check_ranks
from .pipelines.description import check_options
from .pipelines.registry import (
    HOSTS,
    PAG_PIPELINES,
    SAG_PIPELINES,
    STOCK_PIPELINES,
    denoiser_names,
    describe_pipeline,
    described_with,
    host_of,
)
from .runtime.access.entry import check_entry
from .runtime.basic_state import BasicState
from .runtime.own_code import check_has_no_pag, look_at
from .runtime.patch_state import PatchState
from .runtime.perturbed_branches import perturbed_branches
from .runtime.stock_patch import StockPatch
from .runtime.subclass import subclass
from .sag import SagPatch, is_sag
from .settings.layers import Layers, as_list

P = TypeVar("P")


def patch(pipe: P, layers: Layers | None = None, **options: Any) -> P:
    """Make PAG fast in a diffusers pipeline that has it, and add it to one that has not.

    The picture of a PAG pipeline, or of the SAG pipeline, stays the same. A pipeline without PAG
    gets it, with ``pag_scale`` and ``pag_adaptive_scale`` as options here and as arguments of its
    calls. Those of LTX-2 get none: their own guidance is made fast, with the same picture.

    Args:
        pipe: an instance of one of :func:`supported_pipelines`. Only this instance changes.
            Patching it again replaces the earlier settings; if nothing but schedule and rescale
            are others, compiled models keep their graphs.
        layers: attention layers to perturb, e.g. ``"mid"``, ``["blocks.13"]``, ``13``, ``"u0.4"``;
            omitted, the pipeline's own ``pag_applied_layers``, or what
            its description in :mod:`pag_fast.pipelines` names for a pipeline without PAG. See
            :mod:`pag_fast.models.layer_names`. Self-Attention Guidance has none.
        **options: the other fields of :class:`PatchConfig`, or ``config=PatchConfig(...)``.

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: not a supported pipeline, a layer that does not exist, an unknown option. The
            pipeline is then as it was.
    """
    config = _config(layers, options)
    perturbs = config.layers is not None or config.branches is not None
    described = described_with(pipe, perturbs=perturbs)
    check_options(described, config)
    denoisers = [getattr(pipe, name) for name in denoiser_names(pipe)]
    check_ranks(described, denoisers, config)
    check_entry()
    if is_sag(pipe):
        return _put_on(pipe, SagPatch(pipe, config))
    if described.kind == "stock":
        return _put_on(pipe, StockPatch(pipe, config))
    host = described if described.kind == "injected" else None
    _check_code(pipe, config, host)
    original = _users_layers(pipe) if host is None else host.layers
    wanted = _wanted(pipe, config, original)
    before = getattr(pipe, "_pag_fast", None)
    if before is not None:
        before.check_idle("patched anew")
    own = wanted if perturbs or host is not None else None
    cls = type(pipe) if before is None else before.original_class
    new = PatchState(config, cls, original, own, host)
    _hand_over(before, new)
    if before is not None:
        before.release()
    try:
        new.recall(pipe)
        new.compile(pipe)
    except BaseException:
        if before is not None:  # it goes on, and compiles again in its next call
            _hand_over(new, before)
            before.enter_models(pipe)
        raise
    _put_on(pipe, new)
    if own is not None and host is None:
        pipe.pag_applied_layers = own  # type: ignore[attr-defined]
    return pipe


def _check_code(pipe: Any, config: PatchConfig, host: Any) -> None:
    """Raises ValueError for code of the pipeline's own that a patch would pass over."""
    before = getattr(pipe, "_pag_fast", None)
    cls = type(pipe) if before is None else before.original_class
    if host is None:
        look_at(pipe, cls, config)
    else:
        check_has_no_pag(cls)


def _hand_over(before: BasicState | None, new: BasicState | None) -> None:
    """What a patch with PAG has made is the next one's: those of other kinds make nothing."""
    if isinstance(before, PatchState) and isinstance(new, PatchState):
        new.inherit(before)


def _wanted(pipe: Any, config: PatchConfig, original: Any) -> list[str | int]:
    """The layers that are to be perturbed, ``original`` being those of the pipeline.

    Raises:
        ValueError: none, one that does not exist, or that cannot be perturbed like this.
    """
    wanted = list(original) if config.layers is None else as_list(config.layers)
    if config.branches is not None:
        wanted = [layer for branch in config.branches for layer in as_list(branch.layers)]
    for name in denoiser_names(pipe):
        denoiser = uncompiled(getattr(pipe, name))
        family_of(denoiser)
        if not wanted:
            raise ValueError(no_default(denoiser, type(pipe).__name__))
        perturbed_branches(denoiser, wanted, config)
    return wanted


def _put_on(pipe: P, new: PatchState | SagPatch | StockPatch) -> P:
    unpatch(pipe)
    pipe._pag_fast = new  # type: ignore[attr-defined]
    pipe.__class__ = _subclass(cast(Any, type(pipe)), injected=new.host is not None)
    new.enter_models(pipe)
    return pipe


def unpatch(pipe: P) -> P:
    """Undo :func:`patch`: the pipeline has its class, layers and processors back.

    Layers that were set after patching, with ``set_pag_applied_layers``, are kept. A pipeline that
    is not patched is returned as it is.
    """
    found = getattr(pipe, "_pag_fast", None)
    if found is None:
        return pipe
    found.check_idle("unpatched")
    if found.host is None and hasattr(pipe, "pag_applied_layers"):
        pipe.pag_applied_layers = _users_layers(pipe)
    try:
        found.release()
    finally:
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
        _hand_over(getattr(pipe, "_pag_fast", None), before)
        unpatch(pipe)
        if before is not None:
            injected = before.host is not None
            pipe.__class__ = _subclass(before.original_class, injected=injected)
            pipe._pag_fast = before  # type: ignore[attr-defined]
            before.enter_models(pipe)
            if isinstance(before, PatchState):
                before.recall(pipe)
            if before.host is None and layers_before is not None:
                pipe.pag_applied_layers = layers_before  # type: ignore[attr-defined]


def supported_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that are described, where diffusers has them.

    :func:`patch` takes others, too: what runs is then seen in their calls.
    """
    return tuple(filter(_exists, (*PAG_PIPELINES, *SAG_PIPELINES, *STOCK_PIPELINES, *HOSTS)))


def _exists(pipeline: str) -> bool:
    import diffusers

    try:
        return hasattr(diffusers, pipeline)
    except RuntimeError:  # its text encoder is one that this version of transformers has not
        return False


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
    host = host_of(pipe)
    if host is not None:
        return host.layers
    found = getattr(pipe, "_pag_fast", None)
    if found is None:
        return pipe.pag_applied_layers
    # a running call may have named others for itself
    lasting = found.lasting_layers
    layers = pipe.pag_applied_layers if lasting is None else lasting
    return found.original_layers if layers is found.own_layers else layers


def applied_layers(pipe: Any) -> Any:
    """The layers that a call of ``pipe`` perturbs, or would if it were patched."""
    host = host_of(pipe)
    if host is None or hasattr(pipe, "_pag_fast"):
        return pipe.pag_applied_layers
    return list(host.layers)


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline that cannot be patched."""
    describe_pipeline(pipe)


def _subclass(cls: Any, *, injected: bool) -> Any:
    return subclass(cls, cls.__call__, mixins(cls, injected=injected), _reduce)


def _reduce(pipe: Any, protocol: Any) -> Any:
    """How a patched pipeline is copied and pickled: as a stock one that is patched on arrival."""
    found: BasicState = pipe._pag_fast
    attributes = {name: value for name, value in vars(pipe).items() if name != "_pag_fast"}
    chosen = None
    if isinstance(found, PatchState) and found.config.branches is None:
        chosen = list(
            applied_layers(pipe) if found.lasting_layers is None else found.lasting_layers
        )
    if "pag_applied_layers" in attributes:
        attributes["pag_applied_layers"] = _users_layers(pipe)
    return _rebuild, (found.original_class, attributes, found.config, chosen)


def _rebuild(cls: Any, attributes: dict[str, Any], config: PatchConfig, layers: Any) -> Any:
    pipe = cls.__new__(cls)
    vars(pipe).update(attributes)
    patch(pipe, config=config)
    if layers is not None and layers != list(applied_layers(pipe)):
        # not by a method, which may be somebody's and set others than it is given
        found = pipe._pag_fast
        found._set_layers(pipe, found.checked_layers(pipe, layers))
    return pipe
