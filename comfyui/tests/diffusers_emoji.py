"""Draws with diffusers' pipeline of the emoji model: ``diffusers_emoji.py OUT.safetensors``.

A process of its own: here nothing stands in for torchvision, which transformers would take for
installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "pag_fast" / "assets" / "emoji"
PROMPTS = ("red apple", "dog face")
CFG = 2.0
STEPS = 10
SCALES = (0.0, 3.0)  # of PAG


def noise() -> torch.Tensor:
    """The noise that both begin with, a row for every prompt."""
    shape = len(PROMPTS), 4, 16, 16
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline.from_pretrained(FOLDER, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    # ComfyUI's last sigma is 0, and so must be the variance that DDIM ends with
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    return pipe


def main() -> None:
    """Save latents and pictures (rows, height, width, 3) in 0 to 1 of every scale."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    pipe = _pipeline()
    settings = {"num_inference_steps": STEPS, "guidance_scale": CFG, "output_type": "pt"}
    found = {}
    for scale in SCALES:
        call = {**settings, "pag_scale": scale, "latents": noise()}
        found[str(scale)] = pipe(list(PROMPTS), **call).images.movedim(1, -1).contiguous()
    save_file(found, sys.argv[1])


if __name__ == "__main__":
    main()
