"""SD3's joint attention over image and text tokens."""

from __future__ import annotations

from typing import Any

import torch

from .rows import heads_last, project_out
from .self_attention import PerturbedSelfAttention


class PerturbedJointAttention(PerturbedSelfAttention):
    """Replaces ``PAG(CFG)JointAttnProcessor2_0`` of diffusers, without its dense mask.

    QK-norm is applied (SD3.5), and a layer that is called without text, SD3.5's second attention,
    is perturbed as image-only self-attention.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if encoder_hidden_states is None:
            return self.attend(attn, hidden_states, attention_mask, None, None)
        num_attend, num_forked = self.rows(hidden_states.shape[0])
        num_image = hidden_states.shape[1]
        query = self._joint(attn, "q", hidden_states, encoder_hidden_states)
        key = self._joint(attn, "k", hidden_states, encoder_hidden_states)
        value = self._joint(attn, "v", hidden_states, encoder_hidden_states)
        num_context = encoder_hidden_states.shape[1]
        out = self.attention(
            query,
            key,
            value,
            num_attend=num_attend,
            num_forked=num_forked,
            num_context=num_context,
        )
        del query, key, value
        image = project_out(attn, out[:, :num_image])
        # a fork leaves the text of cond and perturbed equal: project it before it is spread
        text = out[:num_attend, num_image:] if num_forked else out[:, num_image:]
        text = text.flatten(2).contiguous()
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        if num_forked:
            text = torch.cat([text] + [text[-num_forked:]] * len(self.branches))
        return image, text

    @staticmethod
    def _joint(attn: Any, which: str, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image = heads_last(getattr(attn, f"to_{which}")(image), attn.heads)
        text = heads_last(getattr(attn, f"add_{which}_proj")(text), attn.heads)
        norm = getattr(attn, f"norm_{which}", None) if which != "v" else None
        if norm is not None:
            image = norm(image)
        norm = getattr(attn, f"norm_added_{which}", None) if which != "v" else None
        if norm is not None:
            text = norm(text)
        return torch.cat([image, text], dim=1)
