"""A picture does not depend on its neighbours: alone, in a batch, and at another place in it."""

from __future__ import annotations

import functools

import pytest
import shallow
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast
from pag_fast.perturbations import BlurredQueries

TOGETHER = ["FluxPipeline", "QwenImagePipeline", "WanPipeline", "LTXPipeline", "Lumina2Pipeline"]
TOGETHER += ["CogVideoXPipeline", "HunyuanVideoPipeline", "StableDiffusion3Pipeline"]
TOGETHER += ["PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline", "StableDiffusionPipeline"]
TOGETHER += ["StableDiffusionXLPipeline", "AnimateDiffPipeline"]
PAG = ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline", "SanaPAGPipeline"]
HOW = ["identity", "blur", "blur_map", "noise", "shuffle", "skip"]
# as identity and "blur", but for a number: with PAG's own pipelines alone
NUMBERS = ["soft", BlurredQueries(0.7)]
# refused: a blur over a picture where tokens do not show their place, noise without scores
_SEQUENCES = ["FluxPipeline", "QwenImagePipeline", "WanPipeline", "LTXPipeline"]
_SEQUENCES += ["CogVideoXPipeline", "HunyuanVideoPipeline"]
REFUSED = {(name, "blur_map"): "blur over an image" for name in _SEQUENCES}
REFUSED["AnimateDiffPipeline", "blur_map"] = "tokens of .* are frames"
REFUSED |= {(name, "noise"): "linear attention" for name in ("SanaPipeline", "SanaPAGPipeline")}
CASES = [(tiny_hosts, n, how) for n in TOGETHER if n in tiny_hosts.HOSTS for how in HOW]
CASES += [(tiny, n, how) for n in PAG for how in (*HOW, *NUMBERS)]


@functools.cache
def _pipe(module, name):
    """A pipeline and layers in its middle, with few blocks where there is a way."""
    like = shallow.family(name)
    if like in shallow.LAYERS and name != "FluxPipeline":  # whose stacks are both perturbed here
        return shallow.build(name), shallow.LAYERS[like]["middle"]
    specs = module.PIPELINES if module is tiny else module.HOSTS
    return module.build(name), specs[name].layers["middle"]


def _picked(value, rows):
    batch = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 2
    return value[rows] if batch else value


@pytest.mark.parametrize(
    ("module", "name", "how"), CASES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_alone_in_a_batch_and_swapped(module, name, how):
    pipe, layers = _pipe(module, name)
    kwargs = module.call_kwargs(name, pipe, batch=2)
    if (name, how) in REFUSED:
        # by the patch, or by the call, which knows the size
        with pytest.raises(ValueError, match=REFUSED[name, how]):
            module.latents(pag_fast.patch(pipe, layers, perturbation=how), kwargs)
        pag_fast.unpatch(pipe)
        return
    pag_fast.patch(pipe, layers, perturbation=how)

    def run(rows):
        call = {key: _picked(value, rows) for key, value in kwargs.items()}
        call["generator"] = [torch.Generator().manual_seed(7 + row) for row in rows]
        return module.latents(pipe, call)

    try:
        both = run([0, 1])
        assert relative(run([1, 0]).flip(0), both) < 1e-5
        for row in (0, 1):
            assert relative(run([row]), both[row : row + 1]) < 1e-5
    finally:
        pag_fast.unpatch(pipe)
