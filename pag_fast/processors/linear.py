"""Sana's ReLU linear attention."""

from __future__ import annotations

from typing import Any

import torch

from .rows import PerturbedProcessor, heads_last, project_out


class PerturbedLinearAttention(PerturbedProcessor):
    """Replaces ``PAG(CFG)…SanaLinearAttnProcessor2_0`` of diffusers, and QK-norm is applied."""

    linear = True

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = hidden_states.shape[0]
        num_attend, num_forked = self.rows(total)
        num_scored = self.scored(num_attend, total)
        if num_scored:
            scored = hidden_states if num_scored == total else hidden_states[:num_scored]
            query, key = attn.to_q(scored), attn.to_k(scored)
            value = attn.to_v(hidden_states)
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            out = self.attention(
                heads_last(query, attn.heads),
                heads_last(key, attn.heads),
                heads_last(value, attn.heads),
                num_attend=num_attend,
                num_forked=num_forked,
            )
        else:
            out = heads_last(attn.to_v(hidden_states), attn.heads)
        out = self.spread(project_out(attn, out), num_forked)
        # diffusers keeps an fp16 model's residual stream finite here
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out
