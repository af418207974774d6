"""Joint attention over image and text tokens: SD3, Flux, Qwen-Image, HunyuanVideo, CogVideoX."""

from __future__ import annotations

from typing import Any

import torch

from .rows import heads_last, project_out
from .self_attention import PerturbedSelfAttention, rotate

Rotary = tuple[torch.Tensor, torch.Tensor]


class PerturbedJointAttention(PerturbedSelfAttention):
    """SD3: replaces ``PAG(CFG)JointAttnProcessor2_0`` of diffusers, without its dense mask.

    A perturbed image query sees itself and the text; text queries are not perturbed. QK-norm is
    applied (SD3.5), and a layer that is called without text, SD3.5's second attention, is perturbed
    as image-only self-attention.
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
        return self.attend_jointly(attn, hidden_states, encoder_hidden_states)

    def attend_jointly(
        self,
        attn: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        *,
        image_rotary: Any = None,
        text_rotary: Any = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each kind of token through its own projections; ``(image, text)`` as they came.

        ``mask`` says which of ``[rows, 1, 1, image + text]`` keys are to be seen.
        """
        num_attend, num_forked = self.rows(image.shape[0])
        num_image = image.shape[1]
        parts = [
            torch.cat(
                [
                    self.part(attn, f"to_{x}", f"norm_{x}", image, image_rotary),
                    self.part(attn, f"add_{x}_proj", f"norm_added_{x}", text, text_rotary),
                ],
                dim=1,
            )
            for x in "qkv"
        ]
        out = self.attention(
            *parts,
            num_attend=num_attend,
            num_forked=num_forked,
            num_context=text.shape[1],
            attn_mask=mask,
        )
        del parts
        # a fork leaves the text of cond and perturbed equal: project it before it is spread
        rows = num_attend if num_forked else out.shape[0]
        text = self.project_text(attn, out[:rows, num_image:].flatten(2).contiguous())
        if num_forked:
            text = torch.cat([text] + [text[-num_forked:]] * len(self.branches))
        image = out[:, :num_image]
        if getattr(attn, "to_out", None) is None:
            return image.flatten(2), text
        return project_out(attn, image), text

    def project_text(self, attn: Any, text: torch.Tensor) -> torch.Tensor:
        """The text's output layer, where it has one."""
        has_own = getattr(attn, "to_add_out", None) is not None and not attn.context_pre_only
        return attn.to_add_out(text) if has_own else text

    def part(
        self, attn: Any, projection: str, norm: str, x: torch.Tensor, rotary: Any
    ) -> torch.Tensor:
        """Queries, keys or values ``[rows, N, H, D]`` of one kind of token."""
        x = getattr(attn, projection)(x)
        # a rank may have some of the heads
        x = heads_last(x, x.shape[-1] * attn.heads // attn.inner_dim)
        if projection in ("to_v", "add_v_proj"):
            return x
        layer = getattr(attn, norm, None)
        x = x if layer is None else layer(x)
        return x if rotary is None else self.rotate(x, rotary)

    rotate = staticmethod(rotate)


class PerturbedFluxAttention(PerturbedJointAttention):
    """Flux: in single blocks, text and image come as one sequence, text first."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if encoder_hidden_states is not None:
            image, text = _split_tables(image_rotary_emb, encoder_hidden_states.shape[1])
            return self.attend_jointly(
                attn, hidden_states, encoder_hidden_states, image_rotary=image, text_rotary=text
            )
        assert self.state is not None
        context = self.state.num_contexts[0]
        tables = _split_tables(image_rotary_emb, context)
        rotary = None
        if image_rotary_emb is not None:
            rotary = tuple(torch.cat(pair) for pair in zip(*tables, strict=True))
        # the op takes the text last: its order is nothing to an attention
        hidden_states = torch.cat([hidden_states[:, context:], hidden_states[:, :context]], dim=1)
        out = self.attend_single(attn, hidden_states, rotary, context)
        return torch.cat([out[:, -context:], out[:, :-context]], dim=1)

    def attend_single(self, attn: Any, x: torch.Tensor, rotary: Any, context: int) -> torch.Tensor:
        num_attend, num_forked = self.rows(x.shape[0])
        out = self.attention(
            self.part(attn, "to_q", "norm_q", x, rotary),
            self.part(attn, "to_k", "norm_k", x, rotary),
            self.part(attn, "to_v", "", x, None),
            num_attend=num_attend,
            num_forked=num_forked,
            num_context=context,
        )
        return out.flatten(2)


class PerturbedQwenAttention(PerturbedJointAttention):
    """Qwen-Image: complex rotary tables for image and text, and a mask for padded prompts."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = (None, None) if image_rotary_emb is None else image_rotary_emb
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask.bool(), (hidden_states.shape[1], 0), value=True)
            mask = mask[:, None, None, :]
        return self.attend_jointly(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary=image,
            text_rotary=text,
            mask=mask,
        )

    def rotate(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        return apply_rotary_emb_qwen(x, rotary, use_real=False)


class PerturbedHunyuanVideoAttention(PerturbedJointAttention):
    """HunyuanVideo: padded prompts are masked; single blocks use one projection for both."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attend_jointly(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary=image_rotary_emb,
            mask=attention_mask,
        )

    def part(
        self, attn: Any, projection: str, norm: str, x: torch.Tensor, rotary: Any
    ) -> torch.Tensor:
        if getattr(attn, "add_q_proj", None) is None:
            projection = projection.replace("add_", "to_").removesuffix("_proj")
            norm = norm.replace("_added", "")
        return super().part(attn, projection, norm, x, rotary)


class PerturbedHunyuanVideo15Attention(PerturbedHunyuanVideoAttention):
    """HunyuanVideo 1.5: the mask is the prompt's alone.

    Diffusers' mask over all pairs of tokens hides every key from what pads a prompt, too. Nothing
    sees what comes of that, and a mask of the keys is enough.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = hidden_states.shape[1]
        mask = torch.nn.functional.pad(attention_mask.bool(), (image, 0), value=True)
        return self.attend_jointly(
            attn,
            hidden_states,
            encoder_hidden_states,
            image_rotary=image_rotary_emb,
            mask=mask[:, None, None, :],
        )


class PerturbedCogVideoXAttention(PerturbedHunyuanVideoAttention):
    """CogVideoX: one projection, one norm and one output layer for both kinds of token."""

    def project_text(self, attn: Any, text: torch.Tensor) -> torch.Tensor:
        return attn.to_out[1](attn.to_out[0](text))


def _split_tables(rotary: Rotary | None, context: int) -> tuple[Any, Any]:
    """Rotary tables of image and text, where those of the text come first in one table."""
    if rotary is None:
        return None, None
    cosine, sine = rotary
    return (cosine[context:], sine[context:]), (cosine[:context], sine[:context])
