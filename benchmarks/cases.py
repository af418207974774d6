"""Layers and pipelines to measure: published ones on a GPU, smaller ones of their kind on a CPU.

Weights are random and prompts are random embeddings, as in the tests: no time depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from tiny import PIPELINES, build, randomise

from pag_fast.analysis.published import CARDS
from pag_fast.models.tensors import CLIP_TOKENS, T5_TOKENS
from pag_fast.tools import load as models

_HALF = {"block_out_channels": (160, 320, 640), "cross_attention_dim": 1024}
_HALF_UNET = {**_HALF, "attention_head_dim": (2, 5, 10), "sample_size": 64}
LATENTS = [4, 4, 128, 128]  # SDXL's, batch 4
EMOJI_CALL = {"num_inference_steps": 10, "guidance_scale": 2.0, "pag_scale": 3.0}
EMOJI_JOBS = [(caption, seed) for seed, caption in enumerate(["red apple", "rocket"] * 4)]
_XL, _XL_CONTROL = "StableDiffusionXLPAGPipeline", "StableDiffusionXLControlNetPAGPipeline"

SDXL_CALL = {"num_inference_steps": 20, "output_type": "pt"}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Layer:
    """A perturbed layer of a published model: image tokens, heads, head dimension, text tokens."""

    model: str
    family: str
    tokens: int
    heads: int
    head_dim: int
    context: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


LAYERS = [
    Layer("SDXL 1024 mid", "self", 1024, 20, 64),
    Layer("SDXL 1024 up", "self", 4096, 10, 64),
    Layer("SD 1.5 512 up.2", "self", 1024, 8, 80),
    Layer("SD 1.5 512 up.3", "self", 4096, 8, 40),
    Layer("PixArt 1024", "self", 4096, 16, 72),
    Layer("SD3 1024", "joint", 4096, 24, 64, 333),
    Layer("HunyuanDiT 1024", "rotary", 4096, 16, 88),
    Layer("Sana 1024", "linear", 1024, 70, 32),
]


def for_device(layer: Layer, device: str) -> Layer:
    """``layer`` itself on a GPU, a quarter of its tokens on a CPU."""
    if device != "cpu":
        return layer
    return replace(layer, model=f"{layer.model}, a quarter", tokens=layer.tokens // 4)


@dataclass(frozen=True)
class Case:
    """A denoiser in its pipeline: the configuration of its card, where ``config`` says no other.

    ``latent`` is the side of the latents; ``frames`` are AnimateDiff's.
    """

    name: str
    pipeline: str
    layers: tuple[str, ...]
    latent: int
    config: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    cfg: bool = True
    steps: int = 2
    rounds: int = 5
    frames: int = 16


def _published(name: str, pipeline: str, latent: int = 128) -> Case:
    return Case(name, pipeline, CARDS[pipeline].documented_layers, latent, steps=5, rounds=10)


GPU = [
    _published("SDXL 1024", _XL),
    _published("SDXL 1024 + ControlNet", _XL_CONTROL),
    _published("SD 1.5 512", "StableDiffusionPAGPipeline", 64),
    _published("SD3 1024", "StableDiffusion3PAGPipeline"),
    _published("PixArt-Σ 1024", "PixArtSigmaPAGPipeline"),
    _published("Sana 1024", "SanaPAGPipeline", 32),
    _published("HunyuanDiT 1024", "HunyuanDiTPAGPipeline"),
    _published("AnimateDiff 512", "AnimateDiffPAGPipeline", 64),
]
# a quarter of the weights or less, real depths where the fork's place depends on them
CPU = [
    Case("SDXL half width", _XL, ("mid",), 64, _HALF_UNET, rounds=6),
    Case("SDXL half width + ControlNet", _XL_CONTROL, ("mid",), 64, _HALF_UNET, rounds=3),
    Case(
        "SD 1.5 half width",
        "StableDiffusionPAGPipeline",
        ("mid",),
        32,
        {"block_out_channels": (160, 320, 640, 640)},
    ),
    Case(
        "SD3 reduced",
        "StableDiffusion3PAGPipeline",
        ("blocks.13",),
        32,
        {"num_attention_heads": 8, "caption_projection_dim": 512},
    ),
    Case(
        "PixArt-Σ reduced",
        "PixArtSigmaPAGPipeline",
        ("blocks.14",),
        32,
        {"num_attention_heads": 5, "cross_attention_dim": 360, "sample_size": 32},
    ),
    Case(
        "Sana reduced",
        "SanaPAGPipeline",
        ("transformer_blocks.8",),
        16,
        {
            "num_attention_heads": 24,
            "num_cross_attention_heads": 8,
            "cross_attention_head_dim": 96,
            "cross_attention_dim": 768,
        },
    ),
    Case(
        "HunyuanDiT reduced",
        "HunyuanDiTPAGPipeline",
        ("blocks.16",),
        32,
        {"num_attention_heads": 5, "hidden_size": 440, "sample_size": 32},
    ),
    Case(
        "AnimateDiff half width",
        "AnimateDiffPAGPipeline",
        ("mid_block.*attn1",),
        16,
        {"block_out_channels": (160, 320, 640, 640)},
        frames=8,
        steps=1,
    ),
]


def real_pipeline(case: Case, device: str, **parts: Any) -> Any:
    """The pipeline of ``case`` on ``device``, in fp16 there and in fp32 on a CPU.

    Without text encoders; its VAE is tiny, but has the published one's scale, unless ``parts``
    holds another.
    """
    card, spec = CARDS[case.pipeline], PIPELINES[case.pipeline]
    components = build(case.pipeline).components
    torch.manual_seed(0)
    with torch.device(device):
        config = {**card.config, **case.config}
        components[spec.denoiser] = randomise(getattr(diffusers, card.denoiser)(**config))
        if card.controlnet is not None:
            own = {key: config[key] for key in card.controlnet}
            components["controlnet"] = randomise(diffusers.ControlNetModel(**own))
    if card.vae_scale_factor == 8:
        components["vae"] = diffusers.AutoencoderKL(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        )
    components.update(parts)
    if case.pipeline.startswith("StableDiffusionXL"):
        components["add_watermarker"] = False
    pipe = getattr(diffusers, case.pipeline)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float32 if device == "cpu" else torch.float16)


def real_call(case: Case, pipe: Any) -> dict[str, Any]:
    """Arguments of a call of it: the same noise and prompts every time, latents as output."""
    spec = PIPELINES[case.pipeline]
    model = getattr(pipe, spec.denoiser)
    config, device, batch = model.config, pipe.device, case.batch
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source).to(device, model.dtype)

    def both(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {name: normal(*shape), f"negative_{name}": normal(*shape)}

    frames = (case.frames,) if spec.model == "UNetMotionModel" else ()
    call: dict[str, Any] = {
        "latents": normal(batch, config.in_channels, *frames, case.latent, case.latent),
        "height": case.latent * pipe.vae_scale_factor,
        "width": case.latent * pipe.vae_scale_factor,
        "num_inference_steps": case.steps,
        "guidance_scale": 5.0 if case.cfg else 1.0,
        "pag_scale": 3.0,
        "output_type": "latent",
    }
    if frames:
        call["num_frames"] = case.frames
    if spec.model == "SD3Transformer2DModel":
        call |= both("prompt_embeds", batch, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim)
        call |= both("pooled_prompt_embeds", batch, config.pooled_projection_dim)
    elif spec.model == "HunyuanDiT2DModel":
        call["use_resolution_binning"] = False
        sizes = (
            ("", config.text_len, config.cross_attention_dim),
            (
                "_2",
                config.text_len_t5,
                config.cross_attention_dim_t5,
            ),
        )
        for suffix, tokens, width in sizes:
            call |= both(f"prompt_embeds{suffix}", batch, tokens, width)
            for sign in ("", "negative_"):
                mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
                call[f"{sign}prompt_attention_mask{suffix}"] = mask
    elif spec.denoiser == "transformer":
        call |= both("prompt_embeds", batch, 300, config.caption_channels)
        for sign in ("", "negative_"):
            mask = torch.ones(batch, 300, dtype=torch.long, device=device)
            call[f"{sign}prompt_attention_mask"] = mask
        call |= {"negative_prompt": None, "use_resolution_binning": False}
        if spec.model == "SanaTransformer2DModel":
            call["complex_human_instruction"] = None
    else:
        call |= both("prompt_embeds", batch, CLIP_TOKENS, config.cross_attention_dim)
    if spec.xl:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call |= both("pooled_prompt_embeds", batch, pooled)
    if spec.controlnet:
        call["image"] = torch.rand(batch, 3, call["height"], call["width"], generator=source)
    return call


def emoji_pipeline(device: str) -> Any:
    """The model that ships with the package, on ``device``."""
    pipe = models.load("emoji", device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def emoji_call(pipe: Any, *, cfg: bool = True, steps: int = 4) -> dict[str, Any]:
    """Arguments of a call of it for the prompts of ``EMOJI_JOBS``; latents are the output."""
    prompts = [caption for caption, _ in EMOJI_JOBS]
    with torch.no_grad():
        full, empty = pipe.encode_prompt(prompts, pipe.device, 1, True)
    source = torch.Generator().manual_seed(0)
    size = pipe.unet.config.sample_size
    latents = torch.randn(len(prompts), pipe.unet.config.in_channels, size, size, generator=source)
    return {
        "prompt_embeds": full,
        "negative_prompt_embeds": empty,
        "latents": latents.to(pipe.device, full.dtype),
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if cfg else 1.0,
        "pag_scale": 3.0,
        "output_type": "latent",
    }
