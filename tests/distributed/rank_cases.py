"""Cases of branches on ranks: a pipeline, patched on a mesh or alone, and its picture."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import tiny
import tiny_hosts
import torch

import pag_fast


@dataclass(frozen=True)
class Case:
    """One picture: a pipeline, what is different in its call, its patch and its denoiser."""

    pipeline: str
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


SDXL, SD3, FLUX = "StableDiffusionXLPAGPipeline", "StableDiffusion3PAGPipeline", "FluxPipeline"


def module_of(name: str) -> Any:
    return tiny if name in tiny.PIPELINES else tiny_hosts


def build(mesh: Any, case: Case) -> Any:
    """The pipeline, patched, on ranks where there is a mesh."""
    module, options = module_of(case.pipeline), dict(case.options)
    specs = tiny.PIPELINES if module is tiny else tiny_hosts.HOSTS
    if "branches" not in options:
        options.setdefault("layers", specs[case.pipeline].layers["middle"])
    place = None if mesh is None else mesh["branch"]
    return pag_fast.patch(module.build(case.pipeline, **case.model), mesh=place, **options)


def draw(mesh: Any, case: Case, **more: Any) -> torch.Tensor:
    """The latents of one call."""
    pipe, module = build(mesh, case), module_of(case.pipeline)
    kwargs = module.call_kwargs(case.pipeline, pipe, **case.call)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pag_fast")
        return module.latents(pipe, {**kwargs, **more})


def check(name: str, wanted: torch.Tensor, found: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, found[0]) for x in found), f"{name}: ranks differ"
    error = (found[0] - wanted).norm() / wanted.norm()
    assert error <= 2e-6, f"{name}: {error}"
