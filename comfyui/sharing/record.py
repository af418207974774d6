"""What is remembered of an entry of the conditioning, of a step and of a sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch

from . import control
from .inputs import Inputs


@dataclasses.dataclass
class Entry:
    """What one entry of the conditioning went through in the main pass of this step.

    Args:
        inputs: its rows of what the model was called with, by name.
        kept: what the denoiser's plan kept of it, by place. Tensors have this entry's rows only.
        control: the residuals of its ControlNets, as the model received them, if they are whole.
        spoiled: why it cannot be resumed, if it cannot.
        beside: the conditionings whose rows were in its batch.
        valued: whether ``inputs`` are copies, whose values are to be compared.
        doubted: whether other nodes act on the model, so that more has to be compared.
        door: if so, its rows of what the first shared layer was given.
        remembers: a patch of another node has changed what it holds in front of the fork.
        alike: what a whole perturbed pass had at the fork, compared with ``kept``.
    """

    inputs: Inputs
    kept: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    control: control.Residuals | None = None
    spoiled: str | None = None
    beside: tuple[int, ...] = ()
    valued: bool = True
    doubted: bool = False
    door: Inputs | None = None
    remembers: bool = False
    alike: bool | None = None


@dataclasses.dataclass
class Step:
    """One ``predict_noise``: from the main pass until the perturbed pass has resumed."""

    entries: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    mode: str = "off"  # or "record", "resume", "check"
    begun: bool = False
    x: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    patches: list[Any] = dataclasses.field(default_factory=list)
    all_conds: bool = False
    watched: bool = False  # others run between the passes, or act on the model
    doubted: bool = False  # others act on the model
    checked: list[Entry] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Run:
    """One sampling: what its first guided step has shown holds for the others."""

    compared: set[Hashable] = dataclasses.field(default_factory=set)
    wanted: set[Hashable] | None = None
    whole: str | None = None  # why nothing is resumed any more
    trusted: list[list[Any]] = dataclasses.field(default_factory=list)
