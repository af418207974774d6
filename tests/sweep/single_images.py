"""Pipelines of pictures whose denoiser is the only one of its kind."""

from __future__ import annotations

from typing import Any

import torch

from sweep.images import _APART, _MIDDLE, _SMALL, _TEXT_FIRST, _TWO_STACKS
from sweep.spec import DIM, TOKENS, Spec, also, model, normal, vae


def _layered(prefix: str, batch: int) -> dict[str, Any]:
    """Of each token what three layers of the encoder made."""
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    mask[0, -2:] = False
    embeds = normal(2 if prefix else 1, batch, TOKENS, 3, DIM)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


def _counts_prompts(pipe: Any) -> None:
    """It counts prompts by their texts, where their embeddings are given."""
    own = pipe.encode_prompt

    def encode(prompt_embeds: Any = None, **given: Any) -> Any:
        given["prompt"] = [""] * len(prompt_embeds)
        return own(prompt_embeds=prompt_embeds, **given)

    pipe.encode_prompt = encode


SPECS = [
    Spec(
        "AuraFlowPipeline",
        model(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=3,
            num_single_dit_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=DIM,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        louder=8.0,
        layers=[r"^joint_transformer_blocks\.1\.", r"^single_transformer_blocks\.1\."],
        **_TEXT_FIRST,
    ),
    Spec(
        "BriaPipeline",
        call=_SMALL,
        layers=_TWO_STACKS,
        parts=also(
            model(
                "BriaTransformer2DModel",
                patch_size=1,
                in_channels=16,
                num_layers=3,
                num_single_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=DIM,
                pooled_projection_dim=None,
                axes_dims_rope=(0, 4, 4),
            ),
            vae=vae,
        ),
        **_TEXT_FIRST,
    ),
    Spec(
        "OvisImagePipeline",
        model(
            "OvisImageTransformer2DModel",
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        ),
        _TWO_STACKS,
        **_TEXT_FIRST,
        **_APART,
    ),
    Spec(
        "LongCatImagePipeline",
        model(
            "LongCatImageTransformer2DModel",
            patch_size=1,
            in_channels=64,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        ),
        _TWO_STACKS,
        **_TEXT_FIRST,
        **_APART,
        setup=_counts_prompts,
        call={"enable_cfg_renorm": False, "enable_prompt_rewrite": False},
    ),
    Spec(
        "Krea2Pipeline",
        model(
            "Krea2Transformer2DModel",
            in_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=DIM,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
            rope_theta=1000.0,
        ),
        _MIDDLE,
        **_TEXT_FIRST,
        **_APART,
        prompts=_layered,
        weight=lambda scale: 1.0 + scale,
        scales=(4.0, 0.0),
    ),
    Spec(
        "LuminaPipeline",
        model(
            "LuminaNextDiT2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=3,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=DIM,
        ),
        [r"^layers\.1\.attn1"],
        rows=("cond", "uncond"),
        everywhere=True,
        warned="does more to the predictions",
        copies=1,
    ),
    Spec(
        "GlmImagePipeline",
        model(
            "GlmImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=DIM,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=128,
        ),
        _MIDDLE,
        **_TEXT_FIRST,
        **_APART,
        call={"prior_token_ids": lambda batch: torch.arange(16).expand(batch, -1)},
    ),
    Spec(
        "NucleusMoEImagePipeline",
        model(
            "NucleusMoEImageTransformer2DModel",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(8, 4, 4),
            moe_enabled=False,
            capacity_factors=[8.0] * 3,
        ),
        _MIDDLE,
        text="last",
        image=16,
        everywhere=True,
        warned="does more to the predictions",
        **_APART,
    ),
    Spec(
        "PRXPipeline",
        model(
            "PRXTransformer2DModel",
            patch_size=1,
            in_channels=4,
            context_in_dim=DIM,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=3,
            axes_dim=[4, 4],
        ),
        [r"^blocks\.1\."],
        text="first",
        image=64,
        masks=torch.bool,
        batches=(1, 1),  # its timesteps are for one picture, and for two with CFG
        call={"use_resolution_binning": False},
    ),
]
