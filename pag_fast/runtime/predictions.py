"""What a denoiser returns: a tuple or a dataclass, with its prediction in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def prediction_of(out: Any) -> torch.Tensor:
    """A model's prediction, as one tensor of all rows."""
    found = out[0]
    return found if isinstance(found, torch.Tensor) else torch.stack(list(found))


def with_prediction(out: Any, prediction: Any) -> Any:
    """The same kind of output with another prediction."""
    if isinstance(out, tuple):
        return (prediction, *out[1:])
    return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: prediction})
