"""The weights of a degraded latent, from the scheduler, without asking the device."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ..guidance import timestep_value

Weights = tuple[float, float]


class NoiseSchedule:
    """What x₀ and the noise are made of at a timestep, while one pipeline call runs.

    Stock computes both with tensors on the device, anew in every step; the scheduler knows them on
    the host.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._cache: dict[Any, Any] = {}
        self._alphas: tuple[Any, torch.Tensor] | None = None

    def weights(self, timestep: Any) -> tuple[Weights, Weights]:
        """``(clean, noise)`` for :func:`pag_fast.reference.degrade_latents`.

        Raises:
            ValueError: a prediction type that Self-Attention Guidance does not know.
        """
        value = int(timestep_value(self.pipe, timestep, self._cache))
        alphas = self._host_alphas()
        original, noise = _predictions(
            self.pipe.scheduler.config.prediction_type, float(alphas[value])
        )
        signal_level, noise_level = self._levels(value, alphas)
        return (
            (signal_level * original[0], signal_level * original[1]),
            (noise_level * noise[0], noise_level * noise[1]),
        )

    def _host_alphas(self) -> torch.Tensor:
        alphas = self.pipe.scheduler.alphas_cumprod
        if self._alphas is None or self._alphas[0] is not alphas:
            self._alphas = alphas, alphas.to("cpu", torch.float64)
        return self._alphas[1]

    def _levels(self, value: int, alphas: torch.Tensor) -> Weights:
        """What the scheduler's ``add_noise`` multiplies the signal and the noise with."""
        scheduler = self.pipe.scheduler
        # it moves its tables to the device of what it is given: a copy leaves the user's alone
        twin = copy.copy(scheduler)
        twin.alphas_cumprod = alphas
        for name in ("timesteps", "sigmas"):
            table = getattr(scheduler, name, None)
            if isinstance(table, torch.Tensor):
                if self._cache.get(name, (None,))[0] is not table:
                    self._cache[name] = table, table.cpu()
                setattr(twin, name, self._cache[name][1])
        one = torch.tensor([1.0, 0.0], dtype=torch.float64)
        levels = twin.add_noise(one, one.flip(0), torch.tensor([value, value]))
        return float(levels[0]), float(levels[1])


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
