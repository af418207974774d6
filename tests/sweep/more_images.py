"""Pipelines of pictures with a transformer, and prompts of a kind of their own."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from sweep.spec import (
    DIM,
    POOLED,
    TOKENS,
    Spec,
    also,
    model,
    normal,
    vae,
)

_SMALL = {"height": 16, "width": 16}
_MIDDLE = [r"^transformer_blocks\.1\."]
_TWO_STACKS = [r"^transformer_blocks\.1\.", r"^single_transformer_blocks\.1\."]
_APART: dict[str, Any] = {"apart": True, "rows": ("cond", "uncond")}
_TEXT_FIRST: dict[str, Any] = {"text": "first", "image": 16}


# ---- Bria's FIBO: each block has a layer of the encoder ----


def _fibo_encoder(pipe: Any) -> None:
    def encode(prompt: Any, guidance_scale: float, num_images_per_prompt: int, **_: Any) -> Any:
        rows = len(prompt) * num_images_per_prompt
        made = []
        for seed in (1, 2):
            mask = torch.ones(rows, TOKENS)
            mask[0, -2:] = 0
            layers = [normal(seed + 10 * index, rows, TOKENS, 8) for index in range(1, 7)]
            made.append((normal(seed, rows, TOKENS, DIM), mask, layers))
        (embeds, mask, layers), (negative, negative_mask, negative_layers) = made
        return (
            embeds,
            negative,
            torch.zeros(TOKENS, 3),
            mask,
            negative_mask,
            layers,
            negative_layers,
        )

    pipe.encode_prompt = encode


_FIBO = Spec(
    "BriaFiboPipeline",
    also(
        model(
            "BriaFiboTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            text_encoder_dim=8,
            pooled_projection_dim=None,
            axes_dims_rope=(0, 4, 4),
        ),
    ),
    _TWO_STACKS,
    **_TEXT_FIRST,
    setup=_fibo_encoder,
    call={"prompt": lambda batch: ["{}"] * batch},
)


# ---- HiDream: two encoders, one of them by layers ----


def _hidream_prompts(prefix: str, batch: int) -> dict[str, Any]:
    seed = 2 if prefix else 1
    return {
        f"{prefix}prompt_embeds_t5": normal(seed, batch, TOKENS, DIM),
        f"{prefix}prompt_embeds_llama3": normal(seed + 10, 2, batch, TOKENS, 8),
        f"{prefix}pooled_prompt_embeds": normal(seed + 20, batch, POOLED),
    }


def _small_hidream(pipe: Any) -> None:
    """Its pictures have as many pixels as it was trained with."""
    pipe.default_sample_size = 8


# ---- guiders ----


def _guider(pipe: Any, cfg: bool) -> None:
    made = diffusers.ClassifierFreeGuidance(guidance_scale=5.0, enabled=cfg)
    pipe.guider = made


def _two_encoders(prefix: str, batch: int) -> dict[str, Any]:
    seed = 2 if prefix else 1
    made: dict[str, Any] = {}
    for number, suffix in enumerate(("", "_2")):
        mask = torch.ones(batch, TOKENS, dtype=torch.long)
        mask[0, -2:] = 0
        made[f"{prefix}prompt_embeds{suffix}"] = normal(seed + 10 * number, batch, TOKENS, DIM)
        made[f"{prefix}prompt_embeds_mask{suffix}"] = mask
    return made


class _Processor:
    """What is asked for when a pipeline is made."""

    class tokenizer:
        @staticmethod
        def encode(text: str) -> list[int]:
            return [0]

    @staticmethod
    def apply_chat_template(*_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def _qwen_encoder(pipe: Any) -> None:
    def encode(
        *, num_images_per_prompt: int, prompt_embeds: Any, prompt_embeds_mask: Any, **_: Any
    ):
        made = [
            x.repeat_interleave(num_images_per_prompt, 0)
            for x in (prompt_embeds, prompt_embeds_mask)
        ]
        return *made, torch.zeros_like(made[1], dtype=torch.bool)

    pipe.encode_prompt = encode


_QWEN21 = model(
    "QwenImage21Transformer2DModel",
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    context_in_dim=DIM,
    axes_dims_rope=(4, 2, 2),
    causal_condition=False,
)

SPECS = [
    _FIBO,
    Spec(
        "HiDreamImagePipeline",
        model(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[DIM, 8],
            text_emb_dim=POOLED,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 0, 1, 0, 1],
        ),
        [r"^double_stream_blocks\.1\.", r"^single_stream_blocks\.1\."],
        text="last",
        image=16,
        prompts=_hidream_prompts,
        setup=_small_hidream,
    ),
    Spec(
        "HunyuanImagePipeline",
        model(
            "HunyuanImageTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            num_single_layers=3,
            num_refiner_layers=1,
            patch_size=(1, 1),
            guidance_embeds=False,
            text_embed_dim=DIM,
            text_embed_2_dim=DIM,
            rope_axes_dim=(4, 4),
        ),
        _TWO_STACKS,
        text="last",
        image=4,
        cfg="guider",
        before=_guider,
        prompts=_two_encoders,
        **_APART,
    ),
    Spec(
        "ErnieImagePipeline",
        also(
            model(
                "ErnieImageTransformer2DModel",
                hidden_size=32,
                num_attention_heads=2,
                num_layers=3,
                ffn_hidden_size=32,
                in_channels=4,
                out_channels=4,
                text_in_dim=DIM,
                rope_axes_dim=(4, 6, 6),
            ),
            vae=vae,
        ),
        [r"^layers\.1\."],
        text="last",
        image=16,
        prompts=lambda prefix, batch: {
            f"{prefix}prompt_embeds": [
                normal((2 if prefix else 1) + i, TOKENS - 2 * (i == 0), DIM) for i in range(batch)
            ]
        },
        call=_SMALL,
        shared=False,
        warned="sharing branches of this model is not exact",
    ),
    Spec(
        "QwenImage21Pipeline",
        lambda: {**_QWEN21(), "processor": _Processor()},
        _MIDDLE,
        **_TEXT_FIRST,
        **_APART,
        cfg="true_cfg_scale",
        setup=_qwen_encoder,
        refused="none was seen that mixes tokens of the image",
    ),
]
