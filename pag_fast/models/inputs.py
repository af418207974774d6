"""Arguments with which diffusers' pipelines call a denoiser: shapes alone, for counting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..settings.checks import whole_number
from .description import ControlNetDescription
from .registry import CONTROLNETS, DESCRIPTIONS, find, find_controlnet
from .tensors import NewTensors

Inputs = Callable[[int], dict[str, Any]]
"""Forward arguments of a model for a number of rows."""


@dataclass(frozen=True)
class Size:
    """Of a picture or a video: pixels, frames, and how many of them a latent pixel stands for.

    ``frames`` are those of the video, of which the first has a latent frame of its own and
    ``frame_factor`` others share one.
    """

    height: int
    width: int
    frames: int = 1
    vae_scale_factor: int = 8
    frame_factor: int = 1

    def __str__(self) -> str:
        size = f"{self.height}×{self.width}"
        return size if self.frames == 1 else f"{self.frames} frames of {size}"

    def but(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> Size:
        """The same with other numbers, where they are given.

        Raises:
            ValueError: a number that is no size, or frames of a picture.
        """
        given = given_sizes(height, width, frames, video=self.frames > 1)
        return replace(self, **given)

    @staticmethod
    def of(pipe: Any) -> Size:
        """What a call of ``pipe`` makes unless it is told otherwise."""
        model = getattr(pipe, "unet", None) or pipe.transformer
        factor = _first(pipe, _SPATIAL, 8)
        default = inspect.signature(type(pipe).__call__).parameters
        found = {
            name: default[name].default if name in default else None
            for name in ("height", "width", "num_frames")
        }
        config = model.config
        sample = config.get("sample_size") or getattr(pipe, "default_sample_size", None) or 64
        rows, columns = (sample, sample) if isinstance(sample, int) else tuple(sample)[-2:]
        rows, columns = config.get("sample_height") or rows, config.get("sample_width") or columns
        return Size(
            found["height"] or int(rows) * factor,
            found["width"] or int(columns) * factor,
            found["num_frames"] or int(config.get("sample_frames") or 1),
            factor,
            _first(pipe, _TEMPORAL, 1),
        )

    def inputs(self, model: Any) -> Inputs:
        """Forward arguments of ``model`` at this size."""
        return lambda rows: forward_kwargs(model, rows=rows, **asdict(self))


def given_sizes(height: Any, width: Any, frames: Any, *, video: bool) -> dict[str, int]:
    """Those that are given, by name.

    Raises:
        ValueError: a number that is no size, or frames of a picture.
    """
    found = {"height": height, "width": width, "frames": frames}
    given = {name: whole_number(name, x, least=1) for name, x in found.items() if x is not None}
    if frames is not None and not video:
        raise ValueError("frames is for pipelines that make videos: this one makes pictures.")
    return given


_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def _first(pipe: Any, names: tuple[str, ...], otherwise: int) -> int:
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), otherwise)


def forward_kwargs(
    model: Any,
    *,
    rows: int,
    height: int,
    width: int,
    frames: int = 1,
    vae_scale_factor: int = 8,
    frame_factor: int = 1,
) -> dict[str, Any]:
    """Arguments of ``model.forward`` for ``rows`` rows, on its device and in its dtype.

    ``height`` and ``width`` are pixels; see :class:`Size`. Shapes and text lengths are those with
    which the pipelines of diffusers call the model; everything else follows from ``model.config``.
    Values are uninitialised: this is for counting.

    Raises:
        ValueError: a class that none of the pipelines uses.
    """
    description = find(model) or find_controlnet(model)
    if description is None:
        known = [entry.name for entry in DESCRIPTIONS] + [entry.name for entry in CONTROLNETS]
        raise ValueError(
            f"No inputs are known for {type(model).__name__}; known are {', '.join(known)}."
        )
    parameter = next(model.parameters())
    new = NewTensors(parameter.device, parameter.dtype)
    latent = (
        (frames - 1) // frame_factor + 1,
        height // vae_scale_factor,
        width // vae_scale_factor,
    )
    kwargs = description.inputs(model, new, rows, latent)
    if isinstance(description, ControlNetDescription):
        kwargs.setdefault("controlnet_cond", new(rows, 3, height, width))
    return kwargs
