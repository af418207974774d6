"""A small autoencoder (``AutoencoderTiny``): 64 × 64 pixels to a 16 × 16 × 4 latent and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LATENT_NOISE = 0.1  # what the decoder learns to see through; latents have unit variance


def make_autoencoder() -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
        force_upcast=False,
    )


def train_autoencoder(
    model: Any, images: torch.Tensor, *, steps: int, batch: int = 32, progress: Any = None
) -> Any:
    """Train on randomly moved, scaled and mirrored ``images`` (n, 3, s, s); L1 on pixels and edges.

    Latents are pulled to zero mean and unit variance, so that ``scaling_factor`` can be 1.
    """
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    average = 0.0
    for step in range(steps):
        picked = torch.randint(len(images), (batch,), generator=generator)
        pixels = _vary(images[picked], generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(pixels).float()
            noise = torch.randn(latents.shape, generator=generator)
            decoded = model.decoder(latents + LATENT_NOISE * noise).float()
        loss = F.l1_loss(decoded, pixels) + 0.5 * _edges(decoded, pixels)
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        (loss + 0.05 * (mean.square() + (std - 1).square()).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if progress is not None:
            progress(step, average)
    return model.eval()


def _vary(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    n = len(pixels)
    scale = 1 + 0.3 * (torch.rand(n, generator=generator) - 0.5)
    theta = torch.zeros(n, 2, 3)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = 0.2 * (torch.rand(n, 2, generator=generator) - 0.5)
    still = torch.rand(n, generator=generator) < 0.5
    theta[still] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # outside is white: shift white to 0, where padding is
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def _edges(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    horizontal = F.l1_loss(a.diff(dim=3), b.diff(dim=3))
    return horizontal + F.l1_loss(a.diff(dim=2), b.diff(dim=2))
