"""The weights of a degraded latent, from the scheduler, without asking the device."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ..runtime.guidance import timestep_value

Weights = tuple[float, float]


class NoiseSchedule:
    """What x₀ and the noise are made of at a timestep, while one pipeline call runs.

    Stock computes both with tensors on the device, anew in every step; the scheduler knows them on
    the host.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._cache: dict[Any, Any] = {}
        self._table: tuple[Any, Any, dict[int, tuple[float, float, float]]] | None = None

    def weights(self, timestep: Any) -> tuple[Weights, Weights]:
        """``(clean, noise)`` for :func:`pag_fast.ops.reference.degrade_latents`.

        Raises:
            ValueError: a prediction type that Self-Attention Guidance does not know.
        """
        scheduler = self.pipe.scheduler
        value = int(timestep_value(self.pipe, timestep, self._cache))
        steps, alphas = scheduler.timesteps, scheduler.alphas_cumprod
        # a scheduler that has been told where to begin looks at its own step instead
        told = getattr(scheduler, "begin_index", None) is not None
        table = self._table
        if told or table is None or table[0] is not steps or table[1] is not alphas:
            self._table = table = steps, alphas, _read(scheduler)
        alpha, signal_level, noise_level = table[2][value]
        original, noise = _predictions(scheduler.config.prediction_type, alpha)
        return (
            (signal_level * original[0], signal_level * original[1]),
            (noise_level * noise[0], noise_level * noise[1]),
        )


def _read(scheduler: Any) -> dict[int, tuple[float, float, float]]:
    """Of every timestep: ᾱ, and what ``add_noise`` multiplies the signal and the noise with."""
    # it moves its tables to the device of what it is given: a copy leaves the user's alone
    twin = copy.copy(scheduler)
    for name in ("alphas_cumprod", "timesteps", "sigmas"):
        table = getattr(scheduler, name, None)
        if isinstance(table, torch.Tensor):
            setattr(twin, name, table.cpu())
    steps = twin.timesteps.long()
    ones = torch.ones(len(steps), dtype=torch.float64)
    zeros = torch.zeros_like(ones)
    columns = (
        twin.alphas_cumprod[steps].tolist(),
        twin.add_noise(ones, zeros, steps).tolist(),
        twin.add_noise(zeros, ones, steps).tolist(),
    )
    return dict(zip(steps.tolist(), zip(*columns, strict=True), strict=True))


def _predictions(kind: str, alpha: float) -> tuple[Weights, Weights]:
    """Weights of latents and model output in x₀ and in the noise (arXiv 2202.00512, appendix D)."""
    signal, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    if kind == "epsilon":
        return (1.0 / signal, -noise / signal), (0.0, 1.0)
    if kind == "v_prediction":
        return (signal, -noise), (noise, signal)
    if kind == "sample":
        return (0.0, 1.0), (1.0 / noise, -signal / noise)
    raise ValueError(
        f"The scheduler's prediction_type is {kind!r}: Self-Attention Guidance takes 'epsilon', "
        "'v_prediction' and 'sample'."
    )
