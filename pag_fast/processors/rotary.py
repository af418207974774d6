"""HunyuanDiT's self-attention: per-head QK-norm and 2-D rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from .self_attention import PerturbedSelfAttention


class PerturbedRotaryAttention(PerturbedSelfAttention):
    """Replaces ``PAG(CFG)HunyuanAttnProcessor2_0`` of diffusers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return self.attend(attn, hidden_states, attention_mask, temb, image_rotary_emb)
