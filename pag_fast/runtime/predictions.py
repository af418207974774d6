"""What a denoiser returns: a tuple or a dataclass, with its prediction in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def prediction_of(out: Any) -> torch.Tensor:
    """A model's prediction, as one tensor of all rows."""
    found = out[0]
    return found if isinstance(found, torch.Tensor) else torch.stack(list(found))


def with_prediction(out: Any, prediction: torch.Tensor) -> Any:
    """The same kind of output with another prediction; a list of rows stays one."""
    found: Any = prediction
    if not isinstance(out[0], torch.Tensor):
        found = list(prediction.unbind(0))
    if isinstance(out, tuple):
        return (found, *out[1:])
    return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: found})
