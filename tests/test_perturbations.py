"""Every perturbation, on pipelines, against a naive implementation that shares nothing."""

from __future__ import annotations

import functools

import pytest
from naive import naive
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.perturbations import (
    BlockPerturbation,
    BlurredMap,
    BlurredQueries,
    Branch,
    Identity,
    NoisyScores,
    ShuffledTokens,
    SkippedBlock,
    SoftIdentity,
)

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
SD3, PIXART = "StableDiffusion3PAGPipeline", "PixArtSigmaPAGPipeline"
HUNYUAN, SANA = "HunyuanDiTPAGPipeline", "SanaPAGPipeline"
SIZE = {"height": 16, "width": 24}  # pixels; latents are 8 × 12
# tokens of 8 × 12 latents: UNets at every resolution, transformers with patches of 2. HunyuanDiT's
# are 8 × 8, Sana's 16 × 32
GRIDS = {96: (8, 12), 24: (4, 6), 6: (2, 3), 16: (4, 4), 512: (16, 32)}
EVERYWHERE = [
    Identity(),
    SoftIdentity(0.3),
    SoftIdentity([0.0, 0.9]),
    BlurredQueries(),
    BlurredQueries(0.6),
    BlurredMap(0.6),
    NoisyScores(2.0, seed=2**40 + 5),
    ShuffledTokens(seed=3),
    SkippedBlock(),
]
CASES = [(name, how) for name in (SD, XL, SD3, PIXART) for how in EVERYWHERE]
CASES += [(SANA, how) for how in EVERYWHERE if not isinstance(how, NoisyScores)]
CASES += [(HUNYUAN, how) for how in (SoftIdentity(0.3), BlurredQueries(0.6), *EVERYWHERE[-2:])]


@functools.cache
def _pipe(name):
    return build(name)


def _size(name):
    return {"height": 32, "width": 64} if name == SANA else SIZE


def _kwargs(name, pipe, **change):
    return call_kwargs(name, pipe, **{**_size(name), **change})


def _names(pipe, layers, how):
    """Module names by the rules of the documentation: all attentions, or their blocks."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    from pag_fast.layers import resolve

    names = list(resolve(model, layers))
    if isinstance(how, BlockPerturbation):
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return names


def _both(name, branches, *, cfg=True, layers=None, **options):
    """Final latents: patched, and naively; and what the patch counted."""
    pipe = _pipe(name)
    try:
        if layers is not None:
            pag_fast.patch(pipe, layers, perturbation=branches[0].perturbation, **options)
        else:
            pag_fast.patch(pipe, branches=branches, **options)
        patched = latents(pipe, _kwargs(name, pipe, cfg=cfg))
        steps = dict(pipe._pag_fast.steps)
    finally:
        pag_fast.unpatch(pipe)
    scales = [3.0 if branch.scale is None else branch.scale for branch in branches]
    written = [
        (branch.perturbation, _names(pipe, branch.layers, branch.perturbation), scale)
        for branch, scale in zip(branches, scales, strict=True)
    ]
    with naive(pipe, name, written, GRIDS, cfg):
        expected = latents(pipe, _kwargs(name, pipe, cfg=cfg, pag_scale=sum(scales)))
    return patched, expected, steps


def _layers(name):
    return PIPELINES[name].layers["middle"]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda case: str(case)[:40])
def test_equals_the_naive_one(name, how):
    branch = Branch(_layers(name), how)
    patched, expected, steps = _both(name, [branch], layers=_layers(name))
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared": 2}
    pipe = _pipe(name)
    assert relative(patched, latents(pipe, _kwargs(name, pipe, pag_scale=0.0))) > 1e-3


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("how", EVERYWHERE[3:], ids=str)
def test_without_cfg_and_unshared(how, share, cfg):
    if share and cfg:
        pytest.skip("test_equals_the_naive_one")
    branch = Branch(["mid"], how)
    patched, expected, steps = _both(SD, [branch], layers=["mid"], cfg=cfg, share_branches=share)
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared" if share else "not shared": 2}
