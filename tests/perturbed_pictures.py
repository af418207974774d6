"""Pictures with perturbations, patched and naively: pipelines, their token grids, every object."""

from __future__ import annotations

import functools

from naive import naive
from tiny import build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.perturbations import (
    BlockPerturbation,
    BlurredMap,
    BlurredQueries,
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


@functools.cache
def perturbed_pipe(name):
    return build(name)


def _size(name):
    return {"height": 32, "width": 64} if name == SANA else SIZE


def picture_kwargs(name, pipe, **change):
    return call_kwargs(name, pipe, **{**_size(name), **change})


def _names(pipe, layers, how):
    """Module names by the rules of the documentation: all attentions, or their blocks."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    names = list(resolve(model, layers))
    if isinstance(how, BlockPerturbation):
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return names


def both_pictures(name, branches, *, cfg=True, layers=None, **options):
    """Final latents: patched, and naively; and what the patch counted."""
    pipe = perturbed_pipe(name)
    try:
        if layers is not None:
            pag_fast.patch(pipe, layers, perturbation=branches[0].perturbation, **options)
        else:
            pag_fast.patch(pipe, branches=branches, **options)
        patched = latents(pipe, picture_kwargs(name, pipe, cfg=cfg))
        steps = dict(pipe._pag_fast.steps)
    finally:
        pag_fast.unpatch(pipe)
    scales = [3.0 if branch.scale is None else branch.scale for branch in branches]
    written = [
        (branch.perturbation, _names(pipe, branch.layers, branch.perturbation), scale)
        for branch, scale in zip(branches, scales, strict=True)
    ]
    with naive(pipe, name, written, GRIDS, cfg):
        expected = latents(pipe, picture_kwargs(name, pipe, cfg=cfg, pag_scale=sum(scales)))
    return patched, expected, steps
