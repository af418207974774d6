"""Slow, separate implementations: what diffusers would do without its defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0, SanaLinearAttnProcessor2_0
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0 as Identity


class FixedJoint:
    """PAG for SD3 with QK-norm and dual attention, by a dense mask, for ``branches`` branches."""

    def __init__(self, branches: int) -> None:
        self.branches = branches

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None) -> Any:
        x, text = hidden_states, encoder_hidden_states
        rows = x.shape[0] * (self.branches - 1) // self.branches
        if text is None:
            kept = JointAttnProcessor2_0()(attn, x[:rows])
            return torch.cat([kept, attn.to_out[0](attn.to_v(x[rows:]))])
        kept, kept_text = JointAttnProcessor2_0()(attn, x[:rows], text[:rows])
        image, context = self._masked(attn, x[rows:], text[rows:])
        return torch.cat([kept, image]), torch.cat([kept_text, context])

    def _masked(self, attn, x, text):
        def project(which):
            image = getattr(attn, f"to_{which}")(x).unflatten(-1, (attn.heads, -1))
            added = getattr(attn, f"add_{which}_proj")(text).unflatten(-1, (attn.heads, -1))
            if which != "v" and attn.norm_q is not None:
                image = getattr(attn, f"norm_{which}")(image)
                added = getattr(attn, f"norm_added_{which}")(added)
            return torch.cat([image, added], 1).transpose(1, 2)

        q, k, v = (project(which) for which in "qkv")
        tokens = x.shape[1]
        mask = torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype)
        mask[:tokens, :tokens] = -torch.inf
        mask[:tokens, :tokens].fill_diagonal_(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        image, context = out[:, :tokens], out[:, tokens:]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](image), context


class FixedSana:
    """PAG for Sana with QK-norm."""

    def __init__(self, branches: int) -> None:
        self.branches = branches

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        rows = hidden_states.shape[0] * (self.branches - 1) // self.branches
        kept = SanaLinearAttnProcessor2_0()(attn, hidden_states[:rows])
        return torch.cat([kept, attn.to_out[0](attn.to_v(hidden_states[rows:]))])


@torch.no_grad()
def separate_forwards(
    pipe: Any,
    latents: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    layers: list[Any],
    *,
    steps: int,
    pag_scale: float,
    guidance_scale: Callable[[int], float],
) -> torch.Tensor:
    """Denoise with a Stable Diffusion UNet: one forward per branch, no batch of branches.

    ``layers`` are the perturbed attention modules; ``guidance_scale(step)`` of 1 or less turns CFG
    off for that step.
    """
    pipe.scheduler.set_timesteps(steps)
    for step, t in enumerate(pipe.scheduler.timesteps):
        c = pipe.unet(latents, t, encoder_hidden_states=cond).sample
        kept = [layer.processor for layer in layers]
        for layer in layers:
            layer.set_processor(Identity())
        both = pipe.unet(
            torch.cat([latents] * 2), t, encoder_hidden_states=torch.cat([cond] * 2)
        ).sample
        for layer, processor in zip(layers, kept, strict=True):
            layer.set_processor(processor)
        p = both.chunk(2)[1]
        noise = c + pag_scale * (c - p)
        if guidance_scale(step) > 1:
            u = pipe.unet(latents, t, encoder_hidden_states=uncond).sample
            noise = u + guidance_scale(step) * (c - u) + pag_scale * (c - p)
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents
