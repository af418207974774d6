"""Published configurations of the models behind the pipelines, without their weights.

The ledger builds them on the meta device; :mod:`pag_fast.models.inputs` makes the arguments with
which diffusers' pipelines call them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.inputs import Size
from ..pipelines.injected import HOSTS


@dataclass(frozen=True)
class ModelCard:
    """A pipeline's denoiser (and ControlNet) at a published size.

    ``documented_layers`` are those that diffusers' or the model's documentation recommends;
    ``height``, ``width`` (pixels) and ``frames`` are the model's native size. ``variant`` tells
    checkpoints of one pipeline apart. ``config`` may leave out what is the class's default.
    """

    pipeline: str
    checkpoint: str
    denoiser: str
    config: dict[str, Any]
    documented_layers: tuple[str, ...]
    height: int = 1024
    width: int = 1024
    controlnet: dict[str, Any] | None = None
    vae_scale_factor: int = 8
    frames: int = 1
    frame_factor: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        """What the ledger and the command line call it."""
        return f"{self.pipeline}-{self.variant}" if self.variant else self.pipeline

    @property
    def size(self) -> Size:
        return Size(self.height, self.width, self.frames, self.vae_scale_factor, self.frame_factor)

    @property
    def sequential(self) -> bool:
        """Whether the pipeline runs uncond and cond in two calls of the denoiser."""
        return self.pipeline in HOSTS and HOSTS[self.pipeline].sequential


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


# height, width, frames, frames to a latent frame, pixels to a latent pixel
_WAN_SIZE, _COGVIDEOX_SIZE = (480, 832, 81, 4), (480, 720, 49, 4)
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_COGVIDEOX = "CogVideoXTransformer3DModel"
_COGVIDEOX_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}


def _host(
    name: str, checkpoint: str, model: str, size: tuple[int, ...] = (1024, 1024), **config: Any
) -> ModelCard:
    """``config``: what differs from the class's defaults, from diffusers' conversion scripts."""
    fields = ("height", "width", "frames", "frame_factor", "vae_scale_factor")
    pipeline, _, variant = name.partition("-")
    layers = HOSTS[pipeline].layers
    sizes: dict[str, Any] = dict(zip(fields, size, strict=False))
    return ModelCard(pipeline, checkpoint, model, config, layers, variant=variant, **sizes)


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
        "Stable Diffusion 1.5 + motion adapter v1.5-2",
        "UNetMotionModel",
        _MOTION,
        ("mid_block.*attn1",),
        height=512,
        width=512,
        frames=16,
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
    _host("FluxPipeline", "FLUX.1-dev", "FluxTransformer2DModel", guidance_embeds=True),
    # the size that its README names for squares, and prompts of 128 tokens
    _host("QwenImagePipeline", "Qwen-Image", "QwenImageTransformer2DModel", (1328, 1328)),
    _host("WanPipeline", "Wan 2.1 T2V 14B", "WanTransformer3DModel", _WAN_SIZE),
    _host("WanPipeline-1.3B", "Wan 2.1 T2V 1.3B", "WanTransformer3DModel", _WAN_SIZE, **_WAN_1B),
    _host("LTXPipeline", "LTX-Video 2B 0.9", "LTXVideoTransformer3DModel", (512, 704, 161, 8, 32)),
    _host("CogVideoXPipeline", "CogVideoX 5b", _COGVIDEOX, _COGVIDEOX_SIZE, **_COGVIDEOX_5B),
    _host("CogVideoXPipeline-2b", "CogVideoX 2b", _COGVIDEOX, _COGVIDEOX_SIZE),
    _host(
        "HunyuanVideoPipeline",
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        (720, 1280, 129, 4),
    ),
    _host("Lumina2Pipeline", "Lumina-Image 2.0", "Lumina2Transformer2DModel", cap_feat_dim=2304),
]
CARDS: dict[str, ModelCard] = {card.name: card for card in _CARDS}

# pipelines whose denoiser is that of a card, at its size
_ALIKE = {card.pipeline.replace("PAG", ""): card for card in _CARDS if not card.variant}


def find_card(pipeline: str) -> ModelCard:
    """The model card of a pipeline.

    Pipelines without PAG, and those that begin with a picture, have the denoiser of another one.

    Raises:
        ValueError: no such pipeline.
    """
    if pipeline in CARDS:
        return CARDS[pipeline]
    if pipeline not in HOSTS:
        near = difflib.get_close_matches(pipeline, [*CARDS, *HOSTS], 4, 0.3) or ["FluxPipeline"]
        raise ValueError(
            f"Unknown pipeline {pipeline!r}: try {' or '.join(near)}, or one of those that "
            "`pag-fast layers` lists."
        )
    related = pipeline.replace("Alpha", "Sigma")
    if related not in _ALIKE:
        related = related.replace("Img2Img", "").replace("Inpaint", "")
    return replace(_ALIKE[related], pipeline=pipeline, documented_layers=HOSTS[pipeline].layers)


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


def meta_twin(model: Any) -> nn.Module:
    """A model of the same configuration on the meta device."""
    config = dict(model.config)
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        config.update(encoder_hid_dim_type=None, encoder_hid_dim=None)
    with torch.device("meta"):
        twin = type(model).from_config(config).eval()
    return nn.Module.to(twin, torch.float16)
