"""Which pipelines and options branches on ranks go with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..config import PatchConfig
from ..models.registry import is_derived, uncompiled
from ..pipelines.description import PipelineDescription
from .mesh import check_mesh


def check_ranks(
    description: PipelineDescription, denoisers: Iterable[Any], config: PatchConfig
) -> None:
    """Refuse what does not go with ``config.mesh``.

    Raises:
        ValueError: a pipeline whose branches are not seen beforehand, one rank too many, or CUDA
            graphs.
    """
    mesh = config.mesh
    if mesh is None:
        return
    check_mesh(mesh)
    name = description.name
    if description.is_observed or any(is_derived(uncompiled(model)) for model in denoisers):
        raise ValueError(
            f"mesh needs to know whose rows are whose before they run, and {name} or its denoiser "
            "is one that nobody has described: patch without mesh."
        )
    if description.passes == "alone" and mesh.size() > 2:
        raise ValueError(
            f"{name} has no uncond, so there are cond and perturbed for {mesh.size()} ranks: use a "
            "mesh of 2."
        )
    compiled = config.compilation
    if config.graphs or (compiled is not None and compiled.cuda_graphs):
        raise ValueError(
            "Graphs hold the launches of one process, and what ranks hand each other is between "
            "them: with mesh leave out graphs and cuda_graphs."
        )
