"""HiDream: joint attention, and behind it image and text as one sequence, image first."""

from __future__ import annotations

from typing import Any

import torch

from .rows import PerturbedProcessor, heads_last


class PerturbedHiDreamAttention(PerturbedProcessor):
    """A perturbed image query sees itself and the text; text queries are not perturbed.

    Queries and keys are normalised over all heads at once. Keys of what pads a picture that is no
    square are zero, and are seen.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        hidden_states_masks: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        num_attend, num_forked = self.rows(hidden_states.shape[0])
        parts = self._projected(attn, hidden_states, "", hidden_states_masks)
        text = encoder_hidden_states
        if text is not None:
            both = zip(parts, self._projected(attn, text, "_t", None), strict=True)
            parts = [torch.cat(pair, 1) for pair in both]
            context = text.shape[1]
        else:
            context = self.state.num_contexts[0] if self.state and self.state.num_contexts else 0
        query, key = self._rotated(parts[0], parts[1], image_rotary_emb)
        out = self.attention(
            query,
            key,
            parts[2],
            num_attend=num_attend,
            num_forked=num_forked,
            num_context=context,
        ).flatten(2)
        del parts, query, key
        if text is None:
            return attn.to_out(out)
        # a fork leaves the text of cond and perturbed equal: project it before it is spread
        rows, num_image = num_attend if num_forked else out.shape[0], hidden_states.shape[1]
        text = attn.to_out_t(out[:rows, num_image:])
        if num_forked:
            text = torch.cat([text] + [text[-num_forked:]] * len(self.branches))
        return attn.to_out(out[:, :num_image]), text

    @staticmethod
    def _projected(
        attn: Any, x: torch.Tensor, suffix: str, mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Queries, keys and values ``[rows, N, H, D]`` of one kind of token, or of both."""
        query, key, value = (getattr(attn, f"to_{part}{suffix}")(x) for part in "qkv")
        query = getattr(attn, f"q_rms_norm{suffix}")(query).to(x.dtype)
        key = getattr(attn, f"k_rms_norm{suffix}")(key).to(x.dtype)
        if mask is not None:
            key = key * mask[..., None]
        return [heads_last(part, attn.heads) for part in (query, key, value)]

    @staticmethod
    def _rotated(
        query: torch.Tensor, key: torch.Tensor, table: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's own processor: all channels of a head, or their first half."""
        from diffusers.models.transformers.transformer_hidream_image import apply_rope

        if query.shape[-1] == 2 * table.shape[-3]:
            return apply_rope(query, key, table)
        (query, rest), (key, other) = query.chunk(2, dim=-1), key.chunk(2, dim=-1)
        query, key = apply_rope(query, key, table)
        return torch.cat([query, rest], dim=-1), torch.cat([key, other], dim=-1)
