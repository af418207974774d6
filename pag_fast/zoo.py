"""Published configurations of the models behind the PAG pipelines, without their weights.

The ledger builds them on the meta device, and :func:`forward_kwargs` makes the arguments with which
diffusers' PAG pipelines call any model of these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CLIP_TOKENS, T5_TOKENS = 77, 256


@dataclass(frozen=True)
class ModelCard:
    """A pipeline's denoiser (and ControlNet) at a published size.

    ``documented_layers`` are those that diffusers' or the model's documentation recommends;
    ``height`` and ``width``, in pixels, are the model's native size.
    """

    pipeline: str
    checkpoint: str
    denoiser: str
    config: dict[str, Any]
    documented_layers: tuple[str, ...]
    height: int = 1024
    width: int = 1024
    controlnet: dict[str, Any] | None = None
    vae_scale_factor: int = field(default=8)


_SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_UNET = {**_SDXL, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
_SDXL_CONTROLNET = {k: v for k, v in _SDXL.items() if k != "sample_size"}
_SD15_CONTROLNET = {k: v for k, v in _SD15.items() if k != "sample_size"}
_KOLORS = {
    **_SDXL_UNET,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
_HUNYUAN = {
    "sample_size": 128,
    "num_layers": 40,
    "patch_size": 2,
    "attention_head_dim": 88,
    "num_attention_heads": 16,
    "in_channels": 4,
    "hidden_size": 1408,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "mlp_ratio": 4.3637,
    "text_len": 77,
    "text_len_t5": 256,
    "activation_fn": "gelu-approximate",
    "use_style_cond_and_image_meta_size": False,
}
_PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "patch_size": 2,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}
_SANA = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "attention_head_dim": 32,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
}
_MOTION = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "num_attention_heads": 8,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}


def _sd(pipeline: str, checkpoint: str = "Stable Diffusion 1.5", **config: Any) -> ModelCard:
    return ModelCard(
        pipeline,
        checkpoint,
        "UNet2DConditionModel",
        {**_SD15, **config},
        ("mid",),
        height=512,
        width=512,
        controlnet=_SD15_CONTROLNET if "ControlNet" in pipeline else None,
    )


def _sdxl(pipeline: str, checkpoint: str = "SDXL base 1.0", **config: Any) -> ModelCard:
    return ModelCard(
        pipeline,
        checkpoint,
        "UNet2DConditionModel",
        {**_SDXL_UNET, **config},
        ("mid",),
        controlnet=_SDXL_CONTROLNET if "ControlNet" in pipeline else None,
    )


def _dit(pipeline: str, checkpoint: str, model: str, config: Any, layer: str) -> ModelCard:
    factor = 32 if model.startswith("Sana") else 8
    return ModelCard(pipeline, checkpoint, model, config, (layer,), vae_scale_factor=factor)


_CARDS = [
    _sd("StableDiffusionPAGPipeline"),
    _sd("StableDiffusionPAGImg2ImgPipeline"),
    _sd("StableDiffusionPAGInpaintPipeline", "Stable Diffusion 1.5 inpainting", in_channels=9),
    _sd("StableDiffusionControlNetPAGPipeline"),
    _sd("StableDiffusionControlNetPAGInpaintPipeline"),
    _sdxl("StableDiffusionXLPAGPipeline"),
    _sdxl("StableDiffusionXLPAGImg2ImgPipeline"),
    _sdxl("StableDiffusionXLPAGInpaintPipeline", "SDXL 1.0 inpainting 0.1", in_channels=9),
    _sdxl("StableDiffusionXLControlNetPAGPipeline"),
    _sdxl("StableDiffusionXLControlNetPAGImg2ImgPipeline"),
    ModelCard("KolorsPAGPipeline", "Kolors", "UNet2DConditionModel", _KOLORS, ("mid",)),
    ModelCard(
        "AnimateDiffPAGPipeline",
        "Stable Diffusion 1.5 + motion adapter v1.5-2, 16 frames",
        "UNetMotionModel",
        _MOTION,
        ("mid_block.*attn1",),
        height=512,
        width=512,
    ),
    _dit(
        "StableDiffusion3PAGPipeline",
        "Stable Diffusion 3 medium",
        "SD3Transformer2DModel",
        _SD3,
        "blocks.13",
    ),
    _dit(
        "StableDiffusion3PAGImg2ImgPipeline",
        "Stable Diffusion 3 medium",
        "SD3Transformer2DModel",
        _SD3,
        "blocks.13",
    ),
    _dit("HunyuanDiTPAGPipeline", "HunyuanDiT v1.2", "HunyuanDiT2DModel", _HUNYUAN, "blocks.16"),
    _dit(
        "PixArtSigmaPAGPipeline",
        "PixArt-Σ XL 2 1024",
        "PixArtTransformer2DModel",
        _PIXART,
        "blocks.14",
    ),
    _dit(
        "SanaPAGPipeline",
        "Sana 1.6B 1024",
        "SanaTransformer2DModel",
        _SANA,
        "transformer_blocks.8",
    ),
]
CARDS: dict[str, ModelCard] = {card.pipeline: card for card in _CARDS}


def meta_model(
    card: ModelCard, which: str = "denoiser", dtype: torch.dtype = torch.float16
) -> nn.Module:
    """The ``"denoiser"`` or ``"controlnet"`` of a card on the meta device.

    Raises:
        ValueError: a ControlNet of a card that has none.
    """
    import diffusers

    config = card.config if which == "denoiser" else card.controlnet
    if config is None:
        raise ValueError(f"{card.pipeline} has no ControlNet.")
    name = card.denoiser if which == "denoiser" else "ControlNetModel"
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config).eval()
    # the base method: diffusers' own warns about casting, and nothing here is ever computed
    return nn.Module.to(model, dtype)


def forward_kwargs(
    model: Any,
    *,
    rows: int,
    height: int,
    width: int,
    frames: int = 16,
    vae_scale_factor: int = 8,
) -> dict[str, Any]:
    """Arguments of ``model.forward`` for ``rows`` rows, on its device and in its dtype.

    ``height`` and ``width`` are pixels. Shapes and text lengths are those with which the PAG
    pipelines of diffusers call the model; everything else follows from ``model.config``. Values are
    uninitialised: this is for counting.

    Raises:
        ValueError: a class that none of the pipelines uses.
    """
    name = type(model).__name__
    makers = {
        "UNet2DConditionModel": _unet,
        "UNetMotionModel": _unet,
        "ControlNetModel": _unet,
        "SD3Transformer2DModel": _sd3,
        "HunyuanDiT2DModel": _hunyuan,
        "PixArtTransformer2DModel": _pixart,
        "SanaTransformer2DModel": _pixart,
    }
    if name not in makers:
        raise ValueError(f"No inputs are known for {name}; known are {', '.join(makers)}.")
    parameter = next(model.parameters())
    new = _Maker(parameter.device, parameter.dtype)
    latent = (height // vae_scale_factor, width // vae_scale_factor)
    if name == "UNetMotionModel":
        frames = min(frames, model.config["motion_max_seq_length"])
        return makers[name](model, new, rows, latent, frames)
    kwargs = makers[name](model, new, rows, latent, 0)
    if name == "ControlNetModel":
        kwargs["controlnet_cond"] = new(rows, 3, height, width)
    return kwargs


class _Maker:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)


def _unet(
    model: Any, new: _Maker, rows: int, latent: tuple[int, int], frames: int
) -> dict[str, Any]:
    config = model.config
    shape = (rows, config.in_channels, *([frames] if frames else []), *latent)
    text_dim = config.get("encoder_hid_dim") or config.cross_attention_dim
    tokens = 256 if config.get("encoder_hid_dim_type") == "text_proj" else CLIP_TOKENS
    kwargs: dict[str, Any] = {
        "sample": new(*shape),
        "timestep": 500,
        "encoder_hidden_states": new(rows * max(frames, 1), tokens, text_dim),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {"text_embeds": new(rows, pooled), "time_ids": new(rows, 6)}
    if config.get("time_cond_proj_dim"):
        kwargs["timestep_cond"] = new(rows, config.time_cond_proj_dim)
    return kwargs


def _sd3(model: Any, new: _Maker, rows: int, latent: tuple[int, int], _: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": new(rows, config.pooled_projection_dim),
    }


def _hunyuan(model: Any, new: _Maker, rows: int, latent: tuple[int, int], _: int) -> dict[str, Any]:
    config = model.config
    tokens = (latent[0] // config.patch_size) * (latent[1] // config.patch_size)
    head_dim = model.inner_dim // config.num_attention_heads
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": new(rows, config.text_len, dtype=torch.int64),
        "encoder_hidden_states_t5": new(rows, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": new(rows, config.text_len_t5, dtype=torch.int64),
        "image_rotary_emb": (
            new(tokens, head_dim, dtype=torch.float32),
            new(tokens, head_dim, dtype=torch.float32),
        ),
    }
    if config.use_style_cond_and_image_meta_size:
        kwargs["image_meta_size"] = new(rows, 6)
        kwargs["style"] = new(rows, dtype=torch.int64)
    return kwargs


def _pixart(model: Any, new: _Maker, rows: int, latent: tuple[int, int], _: int) -> dict[str, Any]:
    config = model.config
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, 300, config.caption_channels),
        "encoder_attention_mask": new(rows, 300, dtype=torch.int64),
    }
    if config.get("use_additional_conditions"):
        kwargs["added_cond_kwargs"] = {"resolution": new(rows, 2), "aspect_ratio": new(rows, 1)}
    elif type(model).__name__ == "PixArtTransformer2DModel":
        kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return kwargs
