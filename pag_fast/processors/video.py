"""Self-attention over the tokens of a video: Wan and LTX-Video."""

from __future__ import annotations

from typing import Any

import torch

from .rows import PerturbedProcessor, heads_last, project_out


class PerturbedVideoAttention(PerturbedProcessor):
    """Wan: queries and keys are normalised over all heads at once, then turned."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        total = hidden_states.shape[0]
        num_attend, num_forked = self.rows(total)
        scored = self.scored(num_attend, total)
        if scored:
            attending = hidden_states[:scored]
            out = self.attention(
                self.rotate(attn, attn.norm_q(attn.to_q(attending)), rotary_emb),
                self.rotate(attn, attn.norm_k(attn.to_k(attending)), rotary_emb),
                heads_last(attn.to_v(hidden_states), attn.heads),
                num_attend=num_attend,
                num_forked=num_forked,
            )
        else:
            out = heads_last(attn.to_v(hidden_states), attn.heads)
        return self.spread(project_out(attn, out), num_forked)

    def rotate(self, attn: Any, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        """``[rows, N, H·D]`` turned by tables that broadcast to ``[rows, N, H, D]``."""
        x = heads_last(x, attn.heads)
        if rotary is None:
            return x
        # every channel of a pair carries the same angle
        cos, sin = rotary[0][..., ::2], rotary[1][..., 1::2]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).to(x.dtype)


class PerturbedLTXAttention(PerturbedVideoAttention):
    """LTX-Video: the tables turn all heads at once, and have rows."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states, None, None, image_rotary_emb)

    def rotate(self, attn: Any, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        if rotary is not None:
            from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

            x = apply_rotary_emb(x, tuple(table[: x.shape[0]] for table in rotary))
        return heads_last(x, attn.heads)
