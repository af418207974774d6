"""The PAG scale of a step, without asking the device for it."""

from __future__ import annotations

from typing import Any

import torch


def scale_at(pipe: Any, timestep: Any, cache: dict[Any, Any], scale: float | None = None) -> float:
    """The PAG scale at ``timestep``: ``max(0, s − a·(1000 − t))`` with adaptive scale ``a``.

    s is ``scale`` or, without one, the call's.

    Diffusers' formula (``PAGMixin._get_pag_scale``). ``timestep`` is a number or a tensor of one
    repeated value on any device; ``cache`` lives as long as the pipeline call and holds the
    scheduler's timesteps on the host, read once.
    """
    scale = float(pipe.pag_scale) if scale is None else scale
    adaptive = float(pipe.pag_adaptive_scale)
    if scale <= 0.0:
        return 0.0
    if adaptive <= 0.0:
        return scale
    return max(0.0, scale - adaptive * (1000.0 - timestep_value(pipe, timestep, cache)))


def timestep_value(pipe: Any, timestep: Any, cache: dict[Any, Any]) -> float:
    """``timestep`` as a Python float; waits for the device only where nothing else tells."""
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    if timestep.device.type == "cpu":
        return float(timestep.flatten()[0])
    all_steps = pipe.scheduler.timesteps
    if cache.get("timesteps") is not all_steps:
        cache["timesteps"], cache["host"] = all_steps, all_steps.tolist()
    index = _index_in(all_steps, timestep)
    if index is None:
        index = getattr(pipe.scheduler, "step_index", None)
    if index is None or not 0 <= index < len(cache["host"]):
        return float(timestep.flatten()[0])
    return float(cache["host"][index])


def _index_in(all_steps: torch.Tensor, timestep: torch.Tensor) -> int | None:
    """Position of ``timestep`` in ``all_steps``, where it is a view into it."""
    if timestep.untyped_storage().data_ptr() != all_steps.untyped_storage().data_ptr():
        return None
    offset = timestep.storage_offset() - all_steps.storage_offset()
    return offset // max(all_steps.stride(0), 1)
