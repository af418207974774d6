"""What a denoiser returns: a tuple or a dataclass, with its prediction in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def prediction_of(out: Any) -> torch.Tensor:
    """A model's prediction, as one tensor of all rows."""
    found = out[0]
    return found if isinstance(found, torch.Tensor) else torch.stack(list(found))


def with_prediction(out: Any, prediction: Any, *, turned: bool = False) -> Any:
    """The same kind of output with another prediction, a tensor or a list of rows.

    What comes beside the prediction, as that of a film's sound, is cut to its rows: they are the
    first, or with ``turned`` the first with their two branches in the opposite order.
    """
    have, want = len(out[0]), len(prediction)

    def cut(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.ndim or x.shape[0] != have:
            return x
        return torch.cat(x[:want].chunk(2)[::-1]) if turned else x[:want]

    if isinstance(out, tuple):
        return (prediction, *(out[1:] if have == want else map(cut, out[1:])))
    first, *others = [field.name for field in dataclasses.fields(out)]
    more = {name: cut(getattr(out, name)) for name in others} if have != want else {}
    return dataclasses.replace(out, **{first: prediction, **more})
