"""Pipelines of pictures whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from sweep.spec import (
    DIM,
    TOKENS,
    Spec,
    also,
    flow,
    model,
    normal,
    picture,
    vae,
    variants,
)


def _flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


_COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": DIM,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def _cogview3() -> dict[str, Any]:
    config = {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}
    return {
        "transformer": diffusers.CogView3PlusTransformer2DModel(**config),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
    }


def _cogview4(**config: Any) -> Any:
    def make() -> dict[str, Any]:
        return {
            "transformer": diffusers.CogView4Transformer2DModel(**{**_COGVIEW, **config}),
            "scheduler": flow(
                base_shift=0.25,
                max_shift=0.75,
                base_image_seq_len=256,
                use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
            "vae": vae(
                block_out_channels=(4,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
        }

    return make


_SMALL = {"height": 16, "width": 16}
_MIDDLE = [r"^transformer_blocks\.1\."]
_TWO_STACKS = [r"^transformer_blocks\.1\.", r"^single_transformer_blocks\.1\."]
_APART: dict[str, Any] = {"apart": True, "rows": ("cond", "uncond")}
_TEXT_FIRST: dict[str, Any] = {"text": "first", "image": 16}
_CHROMA_ROWS: dict[str, Any] = {**_TEXT_FIRST, **_APART, "masks": torch.bool, "copies": 1}
_FLUX2 = model(
    "Flux2Transformer2DModel",
    patch_size=1,
    in_channels=16,
    num_layers=3,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=DIM,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
_CHROMA = model(
    "ChromaTransformer2DModel",
    patch_size=1,
    in_channels=16,
    num_layers=3,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=DIM,
    axes_dims_rope=(4, 4, 8),
    approximator_hidden_dim=32,
    approximator_layers=1,
    approximator_num_channels=16,
)
_Z_IMAGE: dict[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": DIM,
    "rope_theta": 256.0,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}


def _listed(prefix: str, batch: int) -> dict[str, Any]:
    """Prompts as a list, each as long as it is."""
    seed = 2 if prefix else 1
    lengths = [TOKENS - 2, TOKENS][:batch] if batch > 1 else [TOKENS]
    rows = [normal(seed + index, length, DIM) for index, length in enumerate(lengths)]
    return {f"{prefix}prompt_embeds": rows}


def _has_no_guidance(pipe: Any) -> None:
    """Its loop asks for a setting that its denoiser has not."""
    pipe.transformer.register_to_config(guidance_embeds=False)


def _z_tokens(rows: int, queries: int, keys: int) -> torch.Tensor:
    """Image in front, padded to 32 tokens; behind it the prompt, padded to as many."""
    image = torch.zeros(rows, keys, dtype=torch.bool)
    image[:, :16] = True
    return image


_Z = Spec(
    "ZImagePipeline",
    also(model("ZImageTransformer2DModel", **_Z_IMAGE), vae=vae),
    [r"^layers\.1\."],
    text=_z_tokens,
    scales=(5.0, 0.0),
    weight=lambda scale: 1.0 + scale,
    prompts=_listed,
    rows=("cond", "uncond"),
    call=_SMALL,
)
_KLEIN = Spec(
    "Flux2KleinPipeline",
    also(_FLUX2, vae=_flux2_vae),
    _TWO_STACKS,
    **_TEXT_FIRST,
    **_APART,
    call=_SMALL,
)

SPECS = [
    Spec("CogView3PlusPipeline", _cogview3, _MIDDLE, **_TEXT_FIRST, copies=1),
    Spec("CogView4Pipeline", _cogview4(), _MIDDLE, **_TEXT_FIRST, **_APART),
    Spec(
        "CogView4ControlPipeline",
        _cogview4(in_channels=8),
        _MIDDLE,
        **_TEXT_FIRST,
        **_APART,
        call={"control_image": picture()},
    ),
    Spec("Flux2Pipeline", _FLUX2, _TWO_STACKS, **_TEXT_FIRST, cfg=""),
    _KLEIN,
    *variants(
        _KLEIN,
        Flux2KleinInpaintPipeline={
            "image": 32,  # those of the picture are behind them
            "louder": 4.0,
            "call": {
                **_SMALL,
                "image": picture(16),
                "mask_image": picture(16)[:, :1],
                "strength": 1.0,
            },
        },
        Flux2KleinKVPipeline={"cfg": "", "apart": False},
    ),
    Spec("ChromaPipeline", _CHROMA, _TWO_STACKS, **_CHROMA_ROWS),
    Spec(
        "ChromaImg2ImgPipeline",
        also(_CHROMA, vae=vae),
        _TWO_STACKS,
        # its encoder's mask has the dtype of what it encodes, and is added to scores
        **{**_CHROMA_ROWS, "masks": torch.float32},
        call={**_SMALL, "image": picture(16), "strength": 1.0},
    ),
    Spec(
        "ChromaInpaintPipeline",
        also(_CHROMA, vae=vae),
        _TWO_STACKS,
        setup=_has_no_guidance,
        **_CHROMA_ROWS,
        call={**_SMALL, "image": picture(16), "mask_image": picture(16)[:, :1], "strength": 1.0},
    ),
    _Z,
    *variants(
        _Z,
        ZImageImg2ImgPipeline={"call": {**_SMALL, "image": picture(16), "strength": 1.0}},
        ZImageInpaintPipeline={
            "call": {
                **_SMALL,
                "image": picture(16),
                "mask_image": picture(16)[:, :1],
                "strength": 1.0,
            }
        },
    ),
]
