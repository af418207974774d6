"""The text encoder and the UNet, and how they are trained together on latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DROPOUT = 0.12  # of captions, for classifier-free guidance
DECAY = 0.999  # of the weights' moving average


@dataclass(frozen=True)
class Stage:
    """A part of the training; each starts from the average of the one before."""

    samples: int
    batch: int
    lr: float
    cool: float


# large batches find the coarse shapes, small ones make more steps of the same samples
STAGES = (
    Stage(samples=32_000, batch=64, lr=1.5e-3, cool=0.0),
    Stage(samples=120_000, batch=32, lr=1.2e-3, cool=0.4),
)


def make_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> Any:
    """4.2 M parameters; self-attention over 256 tokens (16²) and over 64 (8²)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 3),  # the numbers of heads: diffusers' historical misnomer
        cross_attention_dim=128,
        norm_num_groups=16,
    )


def make_scheduler() -> Any:
    """v-prediction down to pure noise (zero terminal SNR), so that white backgrounds are white."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """Caption tokens, noisy latents and timesteps to the predicted v."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(ids)[0]
        return self.unet(noisy, time, text, return_dict=False)[0]


def token_ids(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def train_denoiser(
    model: Denoiser,
    scheduler: Any,
    latents: torch.Tensor,
    ids: torch.Tensor,
    empty: torch.Tensor,
    *,
    samples: int,
    batch: int,
    lr: float,
    cool: float,
    progress: Callable[[int, float, Denoiser], None],
) -> Denoiser:
    """Train on ``latents`` (n, 4, 16, 16) and their captions' ``ids`` (n, 16).

    Returns the moving average of the weights. The learning rate rises over 50 steps, stays, and
    falls to zero over the last part ``cool`` of the steps.
    """
    average = copy.deepcopy(model).requires_grad_(False).eval()
    model.to(memory_format=torch.channels_last).train()
    model.unet.compile()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))
    steps = samples // batch

    def factor(step: int) -> float:
        down = (steps - step) / (cool * steps) if cool else 1.0
        return min(1.0, (step + 1) / 50, down)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        picked = torch.randint(len(latents), (batch,), generator=generator)
        # stratified: every batch sees all noise levels
        offset = torch.rand(batch, generator=generator)
        time = ((torch.arange(batch) + offset) / batch * 1000).long()
        noise = torch.randn(picked.shape + latents.shape[1:], generator=generator)
        noisy = scheduler.add_noise(latents[picked], noise, time)
        target = scheduler.get_velocity(latents[picked], noise, time)
        dropped = torch.rand(batch, 1, generator=generator) < DROPOUT
        text = torch.where(dropped, empty, ids[picked])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy.to(memory_format=torch.channels_last), time, text)
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(model.parameters()), weight=1 - decay
            )
        progress(step, loss.item(), average)
    return average
