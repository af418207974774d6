"""HunyuanDiT's self-attention: per-head QK-norm and 2-D rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
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

    def normalise(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms = (attn.norm_q, attn.norm_k)
        plain = all(type(norm) is torch.nn.LayerNorm for norm in norms)
        alike = plain and norms[0].eps == norms[1].eps
        if not alike or query.shape[-1] % 2:
            return super().normalise(attn, query, key, rotary)
        # a norm without a bias, or without either, has None there
        affine = [(norm.weight, norm.bias) for norm in norms]
        if ops.is_differentiated(query, key, *affine[0], *affine[1]):
            return super().normalise(attn, query, key, rotary)
        if ops.resolve_backend(self.backend, query, default="triton") == "torch":
            return super().normalise(attn, query, key, rotary)
        ops.qk_norm_rope_(
            query,
            key,
            q_affine=affine[0],
            k_affine=affine[1],
            rotary=rotary,
            eps=norms[0].eps,
            backend="triton",
        )
        return query, key
