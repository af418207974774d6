"""The PAG scale of a step, without asking the device for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .schedules import Schedule, Step


def scale_at(
    pipe: Any, timestep: Any, cache: dict[Any, Any], schedule: Schedule | None = None
) -> float:
    """The PAG scale at ``timestep``: ``max(0, s − a·(1000 − t))`` with adaptive scale ``a``.

    Diffusers' formula (``PAGMixin._get_pag_scale``), and what a ``schedule`` makes of it.
    ``timestep`` is a number or a tensor of one repeated value on any device; ``cache`` lives as
    long as the pipeline call and holds the scheduler's timesteps and noise levels on the host, read
    once.

    Raises:
        ValueError: a schedule that does not fit the call (:meth:`Schedule.scale`), or both it and
            the pipeline have an adaptive scale.
    """
    if schedule is None or float(pipe.pag_scale) <= 0.0:
        return _own_scale(pipe, lambda: timestep_value(pipe, timestep, cache))
    _check_adaptive(pipe, schedule)
    return schedule.scale(_step(pipe, _position(pipe, timestep, cache), cache))


def scales_ahead(
    pipe: Any, timestep: Any, cache: dict[Any, Any], schedule: Schedule | None = None
) -> Iterator[float]:
    """The scales of ``timestep`` and of all that follow in the call, as far as can be told now."""
    if schedule is None and float(pipe.pag_adaptive_scale) <= 0.0:
        yield _own_scale(pipe, lambda: 0.0)
        return
    position = _position(pipe, timestep, cache)
    first, count = cache["first"], _step(pipe, position, cache).count
    for at in range(position, first + count):
        step = _step(pipe, at, cache)
        yield step.scale if schedule is None else schedule.scale(step)


def _own_scale(pipe: Any, timestep: Any) -> float:
    """The pipeline's scale; ``timestep()`` is asked for only where it matters."""
    scale = float(pipe.pag_scale)
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


def timestep_value(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> float:
    """``timestep`` as a Python float; waits for the device only where nothing else tells."""
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    if timestep.device.type == "cpu":
        return float(timestep.flatten()[0])
    host = _host_timesteps(pipe, cache)
    index = _known_index(pipe, timestep)
    if index is None or not 0 <= index < len(host):
        return float(timestep.flatten()[0])
    return float(host[index])


def _host_timesteps(pipe: Any, cache: dict[Any, Any]) -> list[float]:
    all_steps = pipe.scheduler.timesteps
    if cache.get("timesteps") is not all_steps:
        cache.clear()
        cache["timesteps"], cache["host"] = all_steps, all_steps.tolist()
    return cache["host"]


def _known_index(pipe: Any, timestep: torch.Tensor) -> int | None:
    """The position among the scheduler's timesteps, where it shows without the value."""
    index = _index_in(pipe.scheduler.timesteps, timestep)
    return getattr(pipe.scheduler, "step_index", None) if index is None else index


def _index_in(all_steps: torch.Tensor, timestep: torch.Tensor) -> int | None:
    """Position of ``timestep`` in ``all_steps``, where it is a view into it."""
    if timestep.untyped_storage().data_ptr() != all_steps.untyped_storage().data_ptr():
        return None
    offset = timestep.storage_offset() - all_steps.storage_offset()
    return offset // max(all_steps.stride(0), 1)


def _position(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> int:
    """The position among the scheduler's timesteps; remembers the first one that is asked for."""
    host = _host_timesteps(pipe, cache)
    index = _known_index(pipe, timestep) if isinstance(timestep, torch.Tensor) else None
    if index is None or not 0 <= index < len(host):
        index = _find(host, timestep_value(pipe, timestep, cache), cache.get("last", -1))
    cache["last"] = index
    cache["first"] = min(cache.get("first", index), index)
    return index


def _find(host: list[float], value: float, last: int) -> int:
    """Where ``value`` is, rather behind ``last`` than before; some schedulers repeat timesteps."""
    # some models are given thousandths
    for wanted in (value, 1000.0 * value):
        found = [i for i, t in enumerate(host) if abs(t - wanted) <= 1e-3 * max(1.0, abs(t))]
        if found:
            exact = [i for i in found if host[i] == wanted] or found
            return next((i for i in exact if i > last), exact[-1])
    raise ValueError(
        f"The denoiser was called at timestep {value:g}, which is none of the scheduler's "
        f"{len(host)}: a schedule cannot tell which step that is. Patch with schedule=None."
    )


def _step(pipe: Any, position: int, cache: dict[Any, Any]) -> Step:
    host = cache["host"]
    if "sigmas" not in cache:
        cache["sigmas"] = _host_sigmas(pipe.scheduler, host)
    # image-to-image begins late, and denoising_end ends early
    left = len(host) - cache["first"]
    count = min(getattr(pipe, "_num_timesteps", None) or left, left)
    timestep, sigmas = float(host[position]), cache["sigmas"]
    return Step(
        index=position - cache["first"],
        count=count,
        timestep=timestep,
        sigma=None if sigmas is None else sigmas[position],
        scale=_own_scale(pipe, lambda: timestep),
    )


def _host_sigmas(scheduler: Any, timesteps: list[float]) -> list[float] | None:
    """The noise level of each timestep, read from the device once per call."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(timesteps):
        host = sigmas.tolist()
        between = getattr(scheduler, "sigmas_interpol", None)
        if isinstance(between, torch.Tensor):
            # DPM2 calls the model a second time between two noise levels
            host[1 : len(timesteps) : 2] = between.tolist()[1 : len(timesteps) : 2]
        return host
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    kept = alphas.tolist()
    signal = [kept[min(max(round(t), 0), len(kept) - 1)] for t in timesteps]
    return [((1.0 - a) / a) ** 0.5 if a > 0.0 else float("inf") for a in signal]
