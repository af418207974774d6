"""The PAG scale of a step, without asking the device for it; PAG as a part of CFG's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import ops
from ..ops import reference
from ..settings.schedules import Schedule, Step


class Place(int):
    """A place among the scheduler's timesteps, which may have one of them several times."""


def scale_at(
    pipe: Any,
    timestep: Any,
    cache: dict[Any, Any],
    schedule: Schedule | None = None,
    scale: float | None = None,
) -> float:
    """The PAG scale at ``timestep``: ``max(0, s − a·(1000 − t))`` with adaptive scale ``a``.

    s is ``scale`` or, without one, the call's. Diffusers' formula (``PAGMixin._get_pag_scale``),
    and what a ``schedule`` makes of it. ``timestep`` is a number, a :class:`Place`, or a tensor of
    one repeated value on any device; ``cache`` lives as long as the pipeline call and holds the
    scheduler's timesteps and noise levels on the host, read once.

    Raises:
        ValueError: a schedule that does not fit the call (:meth:`Schedule.scale`), or both it and
            the pipeline have an adaptive scale.
    """
    if schedule is None or _base(pipe, scale) <= 0.0:
        return _own_scale(pipe, lambda: timestep_value(pipe, timestep, cache), scale)
    _check_adaptive(pipe, schedule)
    return schedule.scale(_step(pipe, place_of(pipe, timestep, cache), cache, scale))


def scales_ahead(
    pipe: Any,
    timestep: Any,
    cache: dict[Any, Any],
    schedule: Schedule | None = None,
    scale: float | None = None,
) -> Iterator[float]:
    """The scales of ``timestep`` and of all that follow in the call, as far as can be told now."""
    if schedule is None and float(pipe.pag_adaptive_scale) <= 0.0:
        yield _own_scale(pipe, lambda: 0.0, scale)
        return
    position = place_of(pipe, timestep, cache)
    first, count = cache["first"], _step(pipe, position, cache).count
    for at in range(position, first + count):
        step = _step(pipe, at, cache, scale)
        yield step.scale if schedule is None else schedule.scale(step)


def _base(pipe: Any, scale: float | None) -> float:
    """The scale of a branch, or the call's."""
    return float(pipe.pag_scale) if scale is None else scale


def _own_scale(pipe: Any, timestep: Any, scale: float | None = None) -> float:
    """The pipeline's scale; ``timestep()`` is asked for only where it matters."""
    scale = _base(pipe, scale)
    adaptive = float(pipe.pag_adaptive_scale)
    if scale <= 0.0:
        return 0.0
    if adaptive <= 0.0:
        return scale
    return max(0.0, scale - adaptive * (1000.0 - timestep()))


def _check_adaptive(pipe: Any, schedule: Schedule) -> None:
    if schedule.adaptive and float(pipe.pag_adaptive_scale) > 0.0:
        raise ValueError(
            f"The call has pag_adaptive_scale={pipe.pag_adaptive_scale!r} and the schedule "
            f"adaptive={schedule.adaptive!r}: leave one of them out."
        )


# ---- where in the call a step is ----


class _Earlier(int):
    """The number of steps of an earlier call, for whoever else reads it."""


@contextmanager
def own_number_of_steps(pipe: Any) -> Iterator[None]:
    """The time of one call: loops of diffusers note how many steps they have, and others do not."""
    own = vars(pipe)
    before = own.get("_num_timesteps")
    if type(before) is int:
        own["_num_timesteps"] = _Earlier(before)
    try:
        yield
    finally:
        if type(own.get("_num_timesteps")) is _Earlier:
            own["_num_timesteps"] = before


def steps_of_call(pipe: Any) -> int | None:
    """How many steps the running call has, if its loop has said so."""
    found = getattr(pipe, "_num_timesteps", None)
    return None if type(found) is _Earlier else found


def timestep_value(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> float:
    """``timestep`` as a Python float; waits for the device only where nothing else tells."""
    if type(timestep) is Place:
        host = host_timesteps(pipe, cache)
        return float(host[min(timestep, len(host) - 1)])
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    if timestep.device.type == "cpu" or not hasattr(pipe.scheduler, "timesteps"):
        return float(timestep.flatten()[0])
    host = host_timesteps(pipe, cache)
    index = _known_index(pipe, timestep)
    if index is None or not 0 <= index < len(host):
        return float(timestep.flatten()[0])
    return float(host[index])


def host_timesteps(pipe: Any, cache: dict[Any, Any]) -> list[float]:
    """The scheduler's timesteps as numbers, read from the device once per call.

    Raises:
        ValueError: it has none.
    """
    try:
        all_steps = pipe.scheduler.timesteps
    except AttributeError:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} has no timesteps: a PAG scale that depends on the "
            "step cannot tell which that is. Patch with schedule=None."
        ) from None
    if cache.get("timesteps") is not all_steps:
        host = all_steps.tolist() if hasattr(all_steps, "tolist") else list(map(float, all_steps))
        # some hand out others of the same values each time
        if host != cache.get("host"):
            cache.clear()
        cache["timesteps"], cache["host"] = all_steps, host
    return cache["host"]


def own_place(pipe: Any, at: Any, cache: dict[Any, Any]) -> Place | None:
    """Which of the scheduler's timesteps a loop's ``at`` is; ``None`` if it is none.

    ``at`` is one, or a thousandth of one, as a number or a tensor.
    """
    if not isinstance(at, (int, float, torch.Tensor)):
        return None
    index = _index(pipe, at, cache)
    return None if index is None else Place(index)


def _index(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> int | None:
    """The position among the scheduler's timesteps, by memory, else by value."""
    host = host_timesteps(pipe, cache)
    if type(timestep) is Place:
        return min(timestep, len(host) - 1)
    index = _known_index(pipe, timestep) if isinstance(timestep, torch.Tensor) else None
    if index is None or not 0 <= index < len(host):
        index = _index_of(host, timestep_value(pipe, timestep, cache), cache.get("last", -1))
    return index


def _known_index(pipe: Any, timestep: torch.Tensor) -> int | None:
    """The position among the scheduler's timesteps, where it shows without the value."""
    index = _index_in(pipe.scheduler.timesteps, timestep)
    return getattr(pipe.scheduler, "step_index", None) if index is None else index


def _index_in(all_steps: Any, timestep: torch.Tensor) -> int | None:
    """Position of ``timestep`` in ``all_steps``, where it is a view into it."""
    if not isinstance(all_steps, torch.Tensor):
        return None
    if timestep.untyped_storage().data_ptr() != all_steps.untyped_storage().data_ptr():
        return None
    offset = timestep.storage_offset() - all_steps.storage_offset()
    return offset // max(all_steps.stride(0), 1)


def place_of(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> Place:
    """The place among the scheduler's timesteps; remembers the first one that is asked for.

    To be asked once for each forward, unless by a :class:`Place`: where the scheduler has a value
    several times, it is the next of them that a forward is at.

    Raises:
        ValueError: it is none of them.
    """
    index = _index(pipe, timestep, cache)
    if index is None:
        value, count = timestep_value(pipe, timestep, cache), len(host_timesteps(pipe, cache))
        raise ValueError(
            f"The denoiser was called at timestep {value:g}, which is none of the scheduler's "
            f"{count}: a schedule cannot tell which step that is. Patch with schedule=None."
        )
    cache["last"] = index
    cache["first"] = min(cache.get("first", index), index)
    return Place(index)


def _index_of(host: list[float], value: float, last: int) -> int | None:
    """Where ``value`` is, rather behind ``last`` than before; some schedulers repeat timesteps."""
    # some models are given thousandths
    for wanted in (value, 1000.0 * value):
        found = [i for i, t in enumerate(host) if abs(t - wanted) <= 1e-3 * max(1.0, abs(t))]
        if found:
            exact = [i for i in found if host[i] == wanted] or found
            return next((i for i in exact if i > last), exact[-1])
    return None


def _step(pipe: Any, position: int, cache: dict[Any, Any], scale: float | None = None) -> Step:
    host = cache["host"]
    if "sigmas" not in cache:
        cache["sigmas"] = _host_sigmas(pipe.scheduler, host)
    # image-to-image begins late, and denoising_end ends early
    left = len(host) - cache["first"]
    count = min(steps_of_call(pipe) or left, left)
    timestep, sigmas = float(host[position]), cache["sigmas"]
    return Step(
        index=position - cache["first"],
        count=count,
        timestep=timestep,
        sigma=None if sigmas is None else sigmas[position],
        scale=_own_scale(pipe, lambda: timestep, scale),
    )


def _host_sigmas(scheduler: Any, timesteps: list[float]) -> list[float] | None:
    """The noise level of each timestep, read from the device once per call.

    The midpoints of DPM++ SDE, which only its steps know, count as the level they lead to.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(timesteps):
        host = sigmas.tolist()
        between = getattr(scheduler, "sigmas_interpol", None)
        if isinstance(between, torch.Tensor):
            # DPM2 calls the model a second time between two noise levels
            host[1 : len(timesteps) : 2] = _between(scheduler, timesteps[1::2], between.tolist())
        return host
    return _trained_sigmas(scheduler, timesteps)


def _between(scheduler: Any, timesteps: list[float], levels: list[float]) -> list[float]:
    """Of a second call at each of the timesteps, the level: there in the table, or one before."""
    count = 2 * len(timesteps)
    trained = _trained_sigmas(scheduler, timesteps)
    if trained is None:
        return levels[1 : 1 + count : 2]
    return min(
        (levels[first : first + count : 2] for first in (1, 0)),
        key=lambda found: sum(
            # of the terminal level, which may be infinite, nothing is left
            abs(1.0 / (1.0 + own) - 1.0 / (1.0 + level))
            for own, level in zip(found, trained, strict=False)
        ),
    )


def _trained_sigmas(scheduler: Any, timesteps: list[float]) -> list[float] | None:
    """The noise levels that a model was trained with at these timesteps."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    kept = alphas.tolist()
    signal = [kept[min(max(round(t), 0), len(kept) - 1)] for t in timesteps]
    return [((1.0 - a) / a) ** 0.5 if a > 0.0 else float("inf") for a in signal]


# ---- for pipelines that combine the branches themselves ----


def guided_cond(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float | None,
    pag_scale: float,
    *,
    rescale: float | None = None,
    rescale_mode: str | None = None,
    from_cond: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The prediction that a pipeline without PAG has to be given in place of ``cond``.

    Its own guidance, ``u + g·(c′ − u)``, is then what :func:`pag_fast.ops.combine_guidance` returns
    for the three predictions: ``c′ = c + (s / g)·(c − p)``, written down for every mode without
    the difference of ``u`` and the combination where there is another way.

    Args:
        uncond: may be ``None`` for pipelines that run it by itself; ``rescale`` with ``"cfg"`` or
            ``"full"``, and ``"snf"``, cannot do without.
        guidance_scale: ``g``; ``None`` where CFG is off: c′ is the combination.
        rescale, rescale_mode: as for :func:`pag_fast.ops.combine_guidance`; ``None`` is neither.
        from_cond: the pipeline computes ``c′ + g·(c′ − u)``, which is CFG with ``g + 1``.

    Returns:
        c′, of ``cond``'s shape and dtype; sums in fp32 or wider. ``cond`` itself where there is
        nothing to add.

    Raises:
        ValueError: a guidance scale of zero, which leaves nothing of c′; ``uncond`` is missing; or
            what the op refuses.
    """
    rescale, rescale_mode = rescale or 0.0, rescale_mode or "cfg"
    if perturbed is None and not (rescale and rescale_mode == "cfg"):
        ops.check_rescale_mode(rescale_mode)
        return cond
    options: dict[str, Any] = {"rescale": rescale, "rescale_mode": rescale_mode, "backend": backend}
    if guidance_scale is None:
        return ops.combine_guidance(
            None, cond, perturbed, guidance_scale=1.0, pag_scale=pag_scale, **options
        )
    g = guidance_scale + 1.0 if from_cond else float(guidance_scale)
    if g == 0.0:
        raise ValueError(
            f"guidance_scale={guidance_scale!r} leaves nothing of the conditional prediction, and "
            "so no place for PAG: use a larger one."
        )
    if rescale_mode != "snf" and not rescale:
        return ops.combine_guidance(
            None, cond, perturbed, guidance_scale=1.0, pag_scale=pag_scale / g, **options
        )
    if uncond is None and rescale_mode != "partial":
        raise ValueError(
            f"rescale_mode={rescale_mode!r} needs the unconditional prediction next to the others, "
            "and this model is called without it: use rescale_mode='partial', or no rescale."
        )
    wide = torch.promote_types(cond.dtype, torch.float32)
    c, u = cond.to(wide), None if uncond is None else uncond.to(wide)
    p = None if perturbed is None else perturbed.to(wide)
    if p is None or rescale_mode in ("cfg", "snf"):
        assert u is not None
        whole = ops.combine_guidance(u, c, p, guidance_scale=g, pag_scale=pag_scale, **options)
        return torch.lerp(u, whole, 1.0 / g).to(cond.dtype)
    term = pag_scale * (c - p)
    reached = term + (c if u is None or rescale_mode == "partial" else u + g * (c - u))
    factor = reference.rescale_factor(reached, c, rescale)
    return (c + factor / g * term).to(cond.dtype)
