"""Lumina 2: text and image tokens in one sequence, of its own length in every row."""

from __future__ import annotations

import math
from typing import Any

import torch

from .rows import PerturbedProcessor, heads_last, project_out


class PerturbedLuminaAttention(PerturbedProcessor):
    """Text, image and padding in a row; several query heads share a key.

    A perturbed image query sees itself and the text; text queries are not perturbed.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> torch.Tensor:
        tokens = hidden_states.shape[1]
        query, key, value = (self.part(attn, x, hidden_states, image_rotary_emb) for x in "qkv")
        repeats = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        scale = attn.scale
        if base_sequence_length is not None:
            scale = math.sqrt(math.log(tokens, base_sequence_length)) * scale
        out, num_forked = self.attend_ragged(query, key, value, scale)
        return self.spread(project_out(attn, out), num_forked)

    def part(self, attn: Any, which: str, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        x = getattr(attn, f"to_{which}")(x)
        x = heads_last(x, x.shape[-1] * attn.heads // attn.inner_dim)
        norm = getattr(attn, f"norm_{which}", None) if which != "v" else None
        if norm is not None:
            x = norm(x)
        if rotary is None or which == "v":
            return x
        from diffusers.models.embeddings import apply_rotary_emb

        return apply_rotary_emb(x, rotary, use_real=False).to(x.dtype)

    def attend_ragged(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, int]:
        """Samples whose prompts have one length go together, others one after the other.

        Padding, which no key and no later token looks at, gets zeros.
        """
        assert self.state is not None
        contexts, image = self.state.num_contexts, self.state.num_image
        num_attend, num_forked = self.rows(query.shape[0])
        samples = len(contexts)
        if len(set(contexts)) == 1:
            picks = [slice(None)]
        else:
            picks = [slice(i, None, samples) for i in range(samples)]
        forked = num_forked * len(self.branches)
        out = value.new_zeros((value.shape[0] + forked, *value.shape[1:]))
        for index, pick in enumerate(picks):
            text = contexts[index]
            # the op takes the text last: its order is nothing to an attention
            parts = [
                torch.cat([x[pick, text : text + image], x[pick, :text]], dim=1)
                for x in (query, key, value)
            ]
            share = len(range(samples)[pick])
            result = self.attention(
                *parts,
                num_attend=num_attend * share // samples,
                num_forked=num_forked * share // samples,
                num_context=text,
                scale=scale,
            )
            out[pick, :text], out[pick, text : text + image] = result[:, image:], result[:, :image]
        return out, num_forked
