"""Image-only self-attention: UNets, motion modules, PixArt, and SD3.5's second attention."""

from __future__ import annotations

from typing import Any

import torch

from .rows import PerturbedProcessor, heads_last, project_out


class PerturbedSelfAttention(PerturbedProcessor):
    """Replaces ``PAG(CFG)IdentitySelfAttnProcessor2_0`` of diffusers, and QK-norm is applied."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.attend(attn, hidden_states, attention_mask, temb, None)

    def attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
        rotary: Any,
    ) -> torch.Tensor:
        """Normalise, project, attend, project out. ``rotary`` is ``(cos, sin)`` for q and k."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        total, tokens = hidden_states.shape[:2]
        num_attend, num_forked = self.rows(total)
        num_scored = self.scored(num_attend, total)
        if num_scored:
            scored = hidden_states if num_scored == total else hidden_states[:num_scored]
            queried, mean_query = scored, None
            if self.means_query(attn, num_attend, total, rotary):
                queried = hidden_states[:num_attend]
                mean = hidden_states[num_attend:].mean(1, keepdim=True)
                mean_query = heads_last(attn.to_q(mean), attn.heads)
            query = heads_last(attn.to_q(queried), attn.heads)
            key = heads_last(attn.to_k(scored), attn.heads)
            value = heads_last(attn.to_v(hidden_states), attn.heads)
            query, key = self.normalise(attn, query, key, rotary)
            out = self.attention(
                query,
                key,
                value,
                num_attend=num_attend,
                num_forked=num_forked,
                attn_mask=_mask(attn, attention_mask, num_scored, tokens),
                mean_query=mean_query,
            )
            del query, key, value  # the output projection needs their room
        else:
            out = heads_last(attn.to_v(hidden_states), attn.heads)
        out = self.spread(project_out(attn, out), num_forked)
        if image_shape is not None:
            out = out.transpose(1, 2).unflatten(2, image_shape[2:])
        if attn.residual_connection:
            out = out + self.spread_input(residual, num_forked)
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    def normalise(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """QK-norm and rotary embedding, where the layer has them; [rows, N, H, D]."""
        if getattr(attn, "norm_q", None) is not None:
            query = attn.norm_q(query)
        if getattr(attn, "norm_k", None) is not None:
            key = attn.norm_k(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key

    def spread_input(self, x: torch.Tensor, num_forked: int) -> torch.Tensor:
        """The module's input with the rows of its output."""
        if not num_forked:
            return x
        return self.spread(torch.cat([x] + [x[-num_forked:]] * len(self.branches)), num_forked)


def rotate(x: torch.Tensor, rotary: Any) -> torch.Tensor:
    """``[rows, N, H, D]`` turned by diffusers' tables ``(cos, sin)`` of ``[N, D]``."""
    from diffusers.models.embeddings import apply_rotary_emb

    # [rows, N, H, D] as the [rows, H, N, D] that diffusers rotates, and back: views only
    return apply_rotary_emb(x.transpose(1, 2), rotary).transpose(1, 2)


def _mask(attn: Any, mask: torch.Tensor | None, rows: int, tokens: int) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask[:rows], tokens, rows)
    return mask.view(rows, attn.heads, -1, mask.shape[-1])
