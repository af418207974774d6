"""What may be attention in a model, and in which blocks, by its modules alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...sharing.plan import argument_names


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose attention may be perturbed, by name: those that have a processor.

    That is how diffusers builds attention. Whether one mixes image tokens, a trace shows.
    """
    own = {name: getattr(module, "processor", None) for name, module in model.named_modules()}
    return {
        name: model.get_submodule(name)
        for name, processor in own.items()
        if callable(processor) and not isinstance(processor, type)
    }


def block_of(model: nn.Module, name: str) -> str:
    """The block that a module is in: the outermost element of a list of modules; else ``""``."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        path = ".".join(parts[:index])
        if part.isdigit() and isinstance(model.get_submodule(path), nn.ModuleList):
            return ".".join(parts[: index + 1])
    return ""


def first_parameter(model: Any) -> str:
    """The name of the argument that holds the latents: the first that a model's forward takes."""
    return argument_names(model)[0]
