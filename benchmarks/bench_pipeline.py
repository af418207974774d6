"""Whole pictures: what a step saves is less of a picture, which has a decoder too."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch

from benchmarks.cases import EMOJI_JOBS, GPU, emoji_pipeline, real_call, real_pipeline
from pag_fast import PatchConfig
from pag_fast.tools.bench.variants import compare_outputs, variants
from pag_fast.tools.metrics import generate

CALL = {"num_inference_steps": 10, "guidance_scale": 2.0, "pag_scale": 3.0}


def test_emoji(compare, compiled, device):
    """Eight pictures from their prompts, as ``pag-fast bench`` makes them."""
    pipe = emoji_pipeline(device)
    ways = variants(pipe, compiled=compiled)
    psnrs = compare_outputs({name: generate(way, EMOJI_JOBS, **CALL) for name, way in ways.items()})
    assert psnrs["patched"] > 80
    compare(
        {name: partial(generate, way, EMOJI_JOBS, **CALL) for name, way in ways.items()},
        suite="pipeline",
        case="emoji batch 8",
        settings={**CALL, "batch": len(EMOJI_JOBS), "layers": list(pipe.pag_applied_layers)},
        dtype="float32",
        rounds=5,
        psnrs=psnrs,
        warm=True,
        per_call=len(EMOJI_JOBS),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes minutes without a GPU")
def test_sdxl(compare, compiled, device):
    """SDXL's UNet and decoder at full size with random weights: 20 steps from an embedding."""
    with torch.device(device):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    case = GPU[0]
    pipe = real_pipeline(case, device, vae=vae)
    call = {**real_call(case, pipe), "num_inference_steps": 20, "output_type": "pt"}
    ways = variants(pipe, PatchConfig(layers=list(case.layers)), compiled=compiled)
    psnrs = compare_outputs({name: way(**call).images for name, way in ways.items()})
    compare(
        {name: partial(way, **call) for name, way in ways.items()},
        suite="pipeline",
        case=case.name,
        settings={"latents": list(call["latents"].shape), "steps": 20, "layers": list(case.layers)},
        dtype="float16",
        rounds=3,
        psnrs=psnrs,
        warm=True,
    )
