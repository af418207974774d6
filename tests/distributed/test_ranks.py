"""Branches on ranks: the picture of one process, the same bits on all, or a ``ValueError``."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import tiny
import tiny_hosts
import torch

import pag_fast

Drawn = dict[str, torch.Tensor]

PAG = {
    "StableDiffusionXLPAGPipeline": {},
    "StableDiffusionXLControlNetPAGPipeline": {"batch": 2},
    "StableDiffusionControlNetPAGInpaintPipeline": {},
    "KolorsPAGPipeline": {"cfg": False},
    "AnimateDiffPAGPipeline": {},
    "StableDiffusion3PAGPipeline": {"batch": 2},
    "HunyuanDiTPAGPipeline": {},
    "PixArtSigmaPAGPipeline": {"batch": 2},
    "SanaPAGPipeline": {},
}


def module_of(name: str) -> Any:
    return tiny if name in tiny.PIPELINES else tiny_hosts


def draw(mesh: Any, name: str, call: dict[str, Any], **options: Any) -> torch.Tensor:
    """The latents of one call, on ranks where there is a mesh."""
    module = module_of(name)
    specs = tiny.PIPELINES if module is tiny else tiny_hosts.HOSTS
    if "branches" not in options:
        options.setdefault("layers", specs[name].layers["middle"])
    pipe = pag_fast.patch(module.build(name), mesh=mesh, strict=True, **options)
    return module.latents(pipe, module.call_kwargs(name, pipe, **call))


def draw_all(mesh: Any, calls: dict[str, dict[str, Any]]) -> Drawn:
    return {name: draw(mesh, name, call) for name, call in calls.items()}


def compare(whole: Drawn, ranks: list[Drawn]) -> None:
    for name, wanted in whole.items():
        found = [drawn[name] for drawn in ranks]
        assert all(torch.equal(x, found[0]) for x in found), f"{name}: ranks differ"
        error = (found[0] - wanted).norm() / wanted.norm()
        assert error <= 2e-6, f"{name}: {error}"


@pytest.mark.parametrize("size", [2, 3])
def test_pictures_of_pag_pipelines(size: int) -> None:
    whole = draw_all(None, PAG)
    compare(whole, processes.run(size, draw_all, PAG))
