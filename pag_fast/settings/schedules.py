"""How strong PAG is from step to step: adaptive scales, windows, and a factor for every step.

Everything here is a Python float on the host. Nothing in a schedule waits for the device, and a
compiled model never sees it: where the scale is 0.0, the model runs without the perturbed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .checks import Settings, edge, number

FORMS = ("diffusers", "comfyui")


@dataclass(frozen=True)
class Step:
    """One denoiser call, as a schedule sees it.

    Attributes:
        index: its position among those of the pipeline call, from 0. Schedulers that call the model
            twice per step (Heun, DPM2) have a position, and a timestep, for each.
        count: how many positions the call has: ``2·n − 1`` for ``n`` steps of those schedulers.
        timestep: the scheduler's, usually 999 to 0.
        sigma: noise over signal, ``sqrt((1 − ᾱ) / ᾱ)``, about 14.6 to 0 for Stable Diffusion; with
            flow matching the scheduler's own, 1 to 0. ``None`` where the scheduler knows none.
        scale: the PAG scale that the pipeline would use by itself.
    """

    index: int
    count: int
    timestep: float
    sigma: float | None
    scale: float


@dataclass(frozen=True)
class Schedule(Settings):
    """The PAG scale over a call, from the scale the pipeline is called with.

    A step outside of a window, or with a scale of zero, runs without the perturbed branch. Windows
    and factors combine: a step needs to be inside of both windows.

    Attributes:
        adaptive: how fast the scale ``s`` falls with the timestep ``t``; 0 keeps it. Instead of the
            pipeline's ``pag_adaptive_scale``, not on top of it.
        form: what ``adaptive`` means. ``"diffusers"``: ``max(0, s − a·(1000 − t))``, as in
            ``PAGMixin._get_pag_scale``: 3 with 0.005 is 0 from t = 400 on. ``"comfyui"``:
            ``max(0, s − s·a⁴·(1000 − t))`` with ``a`` in 0 to 1, as in the nodes of
            ``pamparamm/sd-perturbed-attention``: 0.2 is 0 from t = 375 on.
        start, stop: the steps with PAG, ``start ≤ i < stop``. A float is a fraction of the steps of
            the call, an int a position (:attr:`Step.index`).
        sigma_start, sigma_end: the noise levels with PAG, ``sigma_end < σ ≤ sigma_start``
            (:attr:`Step.sigma`), as in ComfyUI. ``None``, or a negative number as there, is no
            limit.
        per_step: a factor for each step: one number for every position of the call, or a function
            of a :class:`Step`, which has to return the same for the same step. It may be asked for
            steps ahead of time.
    """

    adaptive: float = 0.0
    form: str = "diffusers"
    start: float = 0.0
    stop: float = 1.0
    sigma_start: float | None = None
    sigma_end: float | None = None
    per_step: Sequence[float] | Callable[[Step], float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or self.form not in FORMS:
            raise ValueError(
                f"Unknown form {self.form!r} of the adaptive scale: choose one of "
                f"{', '.join(map(repr, FORMS))}."
            )
        self._store("adaptive", number("adaptive", self.adaptive, least=0.0))
        if self.form == "comfyui" and self.adaptive > 1.0:
            raise ValueError(
                f"adaptive must be between 0 and 1 with form='comfyui'; got {self.adaptive!r}."
            )
        for name in ("start", "stop"):
            at = edge(name, getattr(self, name))
            self._store(name, at)
            if not _is_whole(at) and at > 1.0:
                raise ValueError(
                    f"{name} must be a fraction of the steps, 0.0 to 1.0, or a whole step as an "
                    f"int; got {at!r}."
                )
        if _is_whole(self.start) == _is_whole(self.stop) and self.start >= self.stop:
            raise ValueError(
                f"No step is between start={self.start!r} and stop={self.stop!r}: start must be "
                "smaller. pag_scale=0 turns PAG off."
            )
        for name in ("sigma_start", "sigma_end"):
            if getattr(self, name) is not None:
                self._store(name, number(name, getattr(self, name)))
        above, below = self._sigmas
        if above >= below:
            raise ValueError(
                f"No noise level is above sigma_end={self.sigma_end!r} and at most "
                f"sigma_start={self.sigma_start!r}: sigma_start must be larger, as sampling begins "
                "there."
            )
        if self.per_step is not None and not callable(self.per_step):
            # a frozen copy: a list that somebody changes later would be another schedule
            self._store("per_step", _checked_factors(self.per_step))

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def _sigmas(self) -> tuple[float, float]:
        """The window of noise levels: above the first, up to and with the second."""
        above, below = self.sigma_end, self.sigma_start
        return (
            -math.inf if above is None or above < 0 else float(above),
            math.inf if below is None or below < 0 else float(below),
        )

    def scale(self, step: Step) -> float:
        """The PAG scale of ``step``, never negative; 0.0 means that nothing has to be perturbed.

        Raises:
            ValueError: ``per_step`` has another number of factors than the call has steps or
                returned something else than a number from 0 on, or there is a window of noise
                levels and the scheduler knows none.
        """
        if isinstance(self.per_step, tuple) and len(self.per_step) != step.count:
            raise ValueError(
                f"per_step has {len(self.per_step)} factors and the call {step.count} steps: give "
                "one for each (a scheduler that calls the model twice per step counts 2·n − 1, "
                "image-to-image the steps that its strength leaves), or a function."
            )
        if not (self._in_steps(step) and self._in_sigmas(step)):
            return 0.0
        falls = step.scale * self.adaptive**4 if self.form == "comfyui" else self.adaptive
        scale = max(0.0, step.scale - falls * (1000.0 - step.timestep))
        return scale * self._factor(step) if scale else 0.0

    def _in_steps(self, step: Step) -> bool:
        return _first(self.start, step.count) <= step.index < _first(self.stop, step.count)

    def _in_sigmas(self, step: Step) -> bool:
        above, below = self._sigmas
        if above == -math.inf and below == math.inf:
            return True
        if step.sigma is None:
            raise ValueError(
                "sigma_start and sigma_end need a scheduler with noise levels (sigmas or "
                "alphas_cumprod), and the pipeline's has none: use start and stop."
            )
        return above < step.sigma <= below

    def _factor(self, step: Step) -> float:
        if self.per_step is None:
            return 1.0
        if isinstance(self.per_step, tuple):
            return float(self.per_step[step.index])
        assert callable(self.per_step)
        name = f"What per_step returns for step {step.index}"
        return number(name, self.per_step(step), least=0.0)

    def __str__(self) -> str:
        """The schedule in words, as ``explain`` shows it."""
        parts = []
        if self.adaptive:
            falls = "s·a⁴" if self.form == "comfyui" else "a"
            parts.append(f"s − {falls}·(1000 − t) with a = {self.adaptive:g}")
        if (self.start, self.stop) != (0.0, 1.0) or _is_whole(self.stop):
            parts.append(f"steps from {_edge(self.start)} to before {_edge(self.stop)}")
        above, below = self._sigmas
        if above > -math.inf or below < math.inf:
            lower = f"{above:g} < " if above > -math.inf else ""
            parts.append(f"{lower}σ" + (f" ≤ {below:g}" if below < math.inf else ""))
        if isinstance(self.per_step, tuple):
            parts.append(f"times a factor for each of {len(self.per_step)} steps")
        elif self.per_step is not None:
            parts.append(f"times {getattr(self.per_step, '__name__', 'a function')}(step)")
        return "; ".join(parts) or "the pipeline's scale in every step"


def _first(edge: float, count: int) -> int:
    """The first of ``count`` positions at or behind an edge of a window."""
    # 0.28 of 25 steps is step 7, though 0.28 * 25 is a little more
    return int(edge) if _is_whole(edge) else math.ceil(edge * count - 1e-9)


def _edge(edge: float) -> str:
    return str(edge) if _is_whole(edge) else f"{100 * edge:g} %"


def _is_whole(edge: object) -> bool:
    return isinstance(edge, Integral)


def _checked_factors(factors: Sequence[float]) -> tuple[float, ...]:
    if isinstance(factors, str | bytes) or not isinstance(factors, Sequence) or not factors:
        raise ValueError(
            "per_step must be a sequence of numbers, one for each step, or a function of a Step; "
            f"got {factors!r}."
        )
    return tuple(
        number(f"per_step[{index}]", factor, least=0.0) for index, factor in enumerate(factors)
    )
