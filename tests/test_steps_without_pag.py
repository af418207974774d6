"""Steps whose PAG scale is zero, in pipelines without PAG: as if nothing were patched."""

from __future__ import annotations

import pytest
import torch
from built_hosts import denoiser_of
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast.perturbations import Branch, Identity

NAMES = [
    "StableDiffusionPipeline",
    "FluxPipeline",
    "WanPipeline",
    "LTXPipeline",
    "LTXImageToVideoPipeline",
    "SanaPipeline",
    "ZImagePipeline",
    "ZImageImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
]


def _hook(pipe):
    first = next(x for x in denoiser_of(pipe).modules() if isinstance(x, torch.nn.Linear))
    return first.register_forward_hook(lambda *_: None)


def _picture(name, pipe, cfg):
    return latents(pipe, call_kwargs(name, pipe, cfg=cfg))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name in HOSTS])
def test_no_step_has_a_scale(name, cfg, hooked):
    """Rows that were added, or turned around, go back to the loop as they came."""
    cfg = cfg and bool(HOSTS[name].cfg)
    pipe, layers = build(name), HOSTS[name].layers["middle"]
    stock = _picture(name, pipe, cfg)
    never = pag_fast.Schedule(per_step=lambda step: 0.0)
    if hooked:
        _hook(pipe)
    with pag_fast.patched(pipe, layers, schedule=never):
        found = _picture(name, pipe, cfg)
    assert found.shape == stock.shape and relative(found, stock) < 1e-5


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "ZImagePipeline"])
def test_the_first_step_has_a_scale(name):
    """What makes every row run changes nothing in the steps behind it."""
    pipe, layers = build(name), HOSTS[name].layers["middle"]
    pag_fast.patch(pipe, layers, schedule=pag_fast.Schedule(stop=1))
    expected = _picture(name, pipe, True)
    _hook(pipe)
    with pytest.warns(UserWarning, match="run apart"):
        found = _picture(name, pipe, True)
    assert found.shape == expected.shape and relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline"])
def test_equal_branches_are_one_of_their_weight(name):
    """Three and more that begin in one layer with text: each reads cond's values."""
    layers = HOSTS[name].layers["middle"]
    pictures = []
    for count in (1, 3, 4):
        pipe = build(name)
        branches = [Branch(layers, Identity(), scale=2.4 / count)] * count
        pag_fast.patch(pipe, branches=branches)
        pictures.append(_picture(name, pipe, bool(HOSTS[name].cfg)))
    assert relative(pictures[1], pictures[0]) < 1e-5
    assert relative(pictures[2], pictures[0]) < 1e-5
