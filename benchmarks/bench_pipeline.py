"""Whole pictures: what a step saves is less of a picture, which has a decoder too."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch

from benchmarks.cases import (
    EMOJI_CALL,
    EMOJI_JOBS,
    GPU,
    SDXL_CALL,
    SDXL_VAE,
    emoji_pipeline,
    real_call,
    real_pipeline,
)
from pag_fast import PatchConfig
from pag_fast.tools.bench.variants import compare_outputs, variants
from pag_fast.tools.metrics import generate


def test_emoji(compare, compiled, graphs, device):
    """Eight pictures from their prompts, as ``pag-fast bench`` makes them."""
    pipe = emoji_pipeline(device)
    ways = variants(pipe, compiled=compiled, graphs=graphs)
    psnrs = compare_outputs(
        {name: generate(way, EMOJI_JOBS, **EMOJI_CALL) for name, way in ways.items()}
    )
    assert psnrs["patched"] > 80
    compare(
        {name: partial(generate, way, EMOJI_JOBS, **EMOJI_CALL) for name, way in ways.items()},
        suite="pipeline",
        case="emoji batch 8",
        settings={**EMOJI_CALL, "batch": len(EMOJI_JOBS), "layers": list(pipe.pag_applied_layers)},
        dtype="float32",
        rounds=5,
        psnrs=psnrs,
        warm=True,
        per_call=len(EMOJI_JOBS),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes minutes without a GPU")
def test_sdxl(compare, compiled, graphs, device):
    """SDXL's UNet and decoder at full size with random weights: 20 steps from an embedding."""
    with torch.device(device):
        vae = diffusers.AutoencoderKL(**SDXL_VAE)
    case = GPU[0]
    pipe = real_pipeline(case, device, vae=vae)
    call = {**real_call(case, pipe), **SDXL_CALL}
    ways = variants(pipe, PatchConfig(layers=list(case.layers)), compiled=compiled, graphs=graphs)
    psnrs = compare_outputs({name: way(**call).images for name, way in ways.items()})
    compare(
        {name: partial(way, **call) for name, way in ways.items()},
        suite="pipeline",
        case=case.name,
        settings={
            "latents": list(call["latents"].shape),
            "steps": call["num_inference_steps"],
            "layers": list(case.layers),
        },
        dtype="float16",
        rounds=3,
        psnrs=psnrs,
        warm=True,
    )
