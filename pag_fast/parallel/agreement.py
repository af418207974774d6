"""What ranks compare as numbers: settings of a patch and a call, as every process writes them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ..config import PatchConfig
from ..perturbations import by_name
from ..settings.layers import as_list
from .exchange import Exchange
from .mesh import check_mesh

# what decides how the picture looks; layers are compared by what they are in the model
_OF_PICTURE = ("schedule", "rescale_mode", "rescale", "backend", "reuse")


def code(value: Any) -> int:
    """A number that is the same in every process for equal words, numbers and settings."""
    return zlib.crc32(repr(_written(value)).encode())


def _written(value: Any) -> Any:
    """``value`` without what is another one in every process: addresses, and types of numbers."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        return float(value) if abs(value) < 2**53 else value
    if isinstance(value, list | tuple):
        return [_written(x) for x in value]
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        return type(value).__qualname__, {name: _written(x) for name, x in own.items()}
    found = value if hasattr(value, "__qualname__") else type(value)
    return found.__module__, found.__qualname__


def settings_of(config: PatchConfig) -> dict[str, Any]:
    """The settings that have to be equal on all ranks, by name."""
    found = {name: getattr(config, name) for name in _OF_PICTURE}
    found["perturbation"] = by_name(config.perturbation)
    found["branches"] = [
        (as_list(branch.layers), branch.perturbation, branch.scale)
        for branch in config.branches or ()
    ]
    return found


def agree_on(mesh: Any, settings: Mapping[str, Any], device: torch.device) -> None:
    """Compare settings when a call begins: a rank without PAG would never meet the others.

    Raises:
        ValueError: on all ranks, ones with other settings; or the mesh has no process group.
    """
    check_mesh(mesh)
    exchange, names = Exchange(mesh), sorted(settings)
    own = torch.tensor([code(settings[name]) for name in names], device=device)
    found = exchange.numbers(own).cpu()
    refuse((found != found[0]).any(0), names)


def refuse(differing: torch.Tensor, names: Sequence[str]) -> None:
    """Raises ValueError naming what is not equal on all ranks, if anything is not."""
    wrong = [name for name, differs in zip(names, differing.tolist(), strict=True) if differs]
    if wrong:
        raise ValueError(
            "The ranks of this mesh do not draw the same picture: they differ in "
            f"{', '.join(wrong)}. Give all of them the same arguments and settings, and a "
            "generator with the same seed."
        )
