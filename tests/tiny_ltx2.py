"""LTX-2's pipelines in miniature: film and sound, and guidance of their own."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import tiny
import torch
from copies import made_once
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tiny_hosts.spec import picture

LAYERS = 5
TEXT, WIDTH = 6, 16


def transformer(**overrides: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": LAYERS,
        "caption_channels": WIDTH,
        "rope_double_precision": False,
        "rope_type": "split",
        "perturbed_attn": True,
    }
    return diffusers.LTX2VideoTransformer3DModel(**{**config, **overrides})


def _connectors() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "num_layers": 1}
    config = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {**sizes, "num_learnable_registers": None}.items()
    }
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=2,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **config,
    )


def _vae() -> Any:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
    )


def _audio_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )


@made_once
def build(name: str = "LTX2Pipeline", **overrides: Any) -> Any:
    """A tiny pipeline; ``overrides`` go to the denoiser's configuration."""
    torch.manual_seed(0)
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    components = dict.fromkeys([x for x, p in parameters.items() if p.default is p.empty][1:])
    made = {
        "vae": _vae,
        "audio_vae": _audio_vae,
        "connectors": _connectors,
        "transformer": lambda: transformer(**overrides),
    }
    components.update({part: tiny.randomise(make()) for part, make in made.items()})
    components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    name: str, *, batch: int = 1, cfg: bool = True, steps: int = 3, **extra: Any
) -> dict[str, Any]:
    """Arguments of a call; equal calls give equal films."""
    source = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for prefix in ("", "negative_") if cfg else ("",):
        kwargs[f"{prefix}prompt_embeds"] = torch.randn(batch, TEXT, 2 * WIDTH, generator=source)
        mask = torch.ones(batch, TEXT, dtype=torch.long)
        mask[0, :2] = 0  # the first prompt is shorter
        kwargs[f"{prefix}prompt_attention_mask"] = mask
    if name == "LTX2ImageToVideoPipeline":
        kwargs["image"] = picture().expand(batch, -1, -1, -1)
        kwargs["image_crf"] = 0  # a tensor is not compressed
    if name == "LTX2HDRPipeline":
        kwargs["stg_scale"] = 1.0  # off unless it is asked for
    scales = ["guidance_scale"] + ["audio_guidance_scale"] * (name != "LTX2HDRPipeline")
    guided = dict.fromkeys(scales, 3.0 if cfg else 1.0)
    return {
        **kwargs,
        **guided,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "spatio_temporal_guidance_blocks": [3],
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **extra,
    }


def latents(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The final latents of film and sound, if there is any, in one row for each."""
    torch.manual_seed(0)
    made = pipe(**kwargs, return_dict=False)
    return torch.cat([x.flatten(1) for x in made if x is not None], dim=1)
