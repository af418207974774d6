"""Image prompts with a row for each picture: diffusers repeats them once more for every prompt."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from random_adapters import with_ip_adapter

import pag_fast

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
MOTION, HOST = "AnimateDiffPAGPipeline", "StableDiffusionPipeline"


def _embeds(rows):
    return [torch.randn(rows, 1, 6, generator=torch.Generator().manual_seed(8))]


def _built(name):
    torch.manual_seed(3)
    return with_ip_adapter((tiny if name in tiny.PIPELINES else tiny_hosts).build(name))


def _run(pipe, name, rows, cfg=True):
    module = tiny if name in tiny.PIPELINES else tiny_hosts
    batch = rows // 2 if cfg else rows
    kwargs = module.call_kwargs(name, pipe, batch=batch, cfg=cfg)
    return module.latents(pipe, {**kwargs, "ip_adapter_image_embeds": _embeds(rows)})


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("pictures", [2, 3])
@pytest.mark.parametrize("name", [SD, XL])
def test_a_row_for_each_picture(name, pictures, cfg):
    pipe, rows = _built(name), 2 * pictures if cfg else pictures
    stock = _run(pipe, name, rows, cfg)
    with pag_fast.patched(pipe, strict=True):
        assert relative(_run(pipe, name, rows, cfg), stock) < 1e-5
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
    assert torch.equal(_run(pipe, name, rows, cfg), stock)


def test_frames_run_apart():
    """Frames come between a picture's rows inside of the model."""
    pipe = _built(MOTION)
    stock = _run(pipe, MOTION, 4)
    with pag_fast.patched(pipe):
        with pytest.warns(UserWarning, match="several rows for each picture"):
            assert relative(_run(pipe, MOTION, 4), stock) < 1e-5
        with pytest.raises(ValueError, match="cannot be told apart"):
            pipe(**_dropped(pipe))
    assert torch.equal(_run(pipe, MOTION, 4), stock)


def _dropped(pipe):
    kwargs = tiny.call_kwargs(MOTION, pipe, batch=2, pag_adaptive_scale=1.0, steps=3)
    return {**kwargs, "ip_adapter_image_embeds": _embeds(4)}


def test_pipelines_without_pag():
    """Alike with the forward of each branch by itself."""
    found = []
    for share in (True, False):
        pipe = _built(HOST)
        pag_fast.patch(pipe, "mid", pag_scale=3.0, share_branches=share, strict=share)
        found.append(_run(pipe, HOST, 4))
    assert relative(*found) < 1e-5
    assert relative(found[0], _run(_built(HOST), HOST, 4)) > 1e-3
