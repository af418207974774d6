"""Pipelines with a picture, a ControlNet or another condition of their own."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from tiny_hosts.videos import wan_vae

from sweep.images import _TWO_STACKS, _Z, _Z_IMAGE
from sweep.single_images import _counts_prompts
from sweep.spec import (
    DIM,
    TOKENS,
    Nothing,
    Spec,
    also,
    film,
    model,
    normal,
    photo,
    picture,
    vae,
    variants,
)
from sweep.unets import _MID, _SIMPLE, _SMALL, _movq, _unet
from sweep.videos import _APART

_MIDDLE = [r"^transformer_blocks\.1\.attn1"]


def _z_net() -> Any:
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1, 2],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        **{
            k: v
            for k, v in _Z_IMAGE.items()
            if k
            not in (
                "in_channels",
                "cap_feat_dim",
                "axes_dims",
                "axes_lens",
                "rope_theta",
                "n_layers",
            )
        },
    )


_VARIATION = Spec(
    "StableDiffusionImageVariationPipeline",
    _unet(),
    _MID,
    setup=lambda pipe: setattr(pipe, "_encode_image", _varied),
    call={**_SMALL, "image": lambda batch: picture(16, batch)},
)


def _varied(image: Any, device: Any, copies: int, cfg: bool) -> torch.Tensor:
    made = normal(1, len(image) * copies, 1, DIM)
    return torch.cat([torch.zeros_like(made), made]) if cfg else made


def _unet3d() -> dict[str, Any]:
    unet = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=DIM,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return {"unet": unet, "scheduler": diffusers.DDIMScheduler(clip_sample=False), "vae": vae()}


def _by_prompt(width: int = DIM) -> Any:
    """A method that encodes prompts, as a pipeline has whose call takes no embeddings."""

    def encode(prompt: Any, device: Any, copies: int, cfg: bool, *_: Any, **__: Any) -> Any:
        made = [normal(seed, len(prompt) * copies, TOKENS, width) for seed in (2, 1)]
        return torch.cat(made) if cfg else made[1]

    return encode


def _audio_unet(**config: Any) -> Any:
    return _unet(
        **{
            "cross_attention_dim": (8, 16, 16),
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": DIM,
            "class_embeddings_concat": True,
            **config,
        }
    )


def _one_vector(prefix: str, batch: int) -> dict[str, Any]:
    return {f"{prefix}prompt_embeds": normal(2 if prefix else 1, batch, DIM)}


def _kandinsky(prefix: str, batch: int) -> dict[str, Any]:
    return {
        "prompt": ["a"] * batch,
        "image_embeds": normal(3, batch, 32),
        "negative_image_embeds": normal(4, batch, 32),
    }


def _two_encodings(pipe: Any) -> None:
    """Of prompts, with what the encoder has of each token and its mask."""

    def encode(prompt: Any, device: Any, copies: int, cfg: bool, negative: Any) -> Any:
        rows = len(prompt) * copies * (2 if cfg else 1)
        return normal(1, rows, 32), normal(2, rows, TOKENS, 24), torch.ones(rows, TOKENS)

    pipe._encode_prompt = encode


class _TextProcessor:
    image_processor = None


class _Vocoder:
    class config:
        upsample_rates = (2, 2)
        sampling_rate = 1600
        model_in_dim = 16

    def __call__(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return spectrogram


SPECS = [
    Spec(
        "PRXPixelPipeline",
        model(
            "PRXTransformer2DModel",
            patch_size=2,
            in_channels=3,
            context_in_dim=DIM,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=3,
            axes_dim=[4, 4],
            bottleneck_size=8,
            resolution_embeds=True,
        ),
        [r"^blocks\.1\."],
        text="first",
        image=64,
        masks=torch.bool,
        batches=(1, 1),
        call={**_SMALL, "use_resolution_binning": False, "output_type": "pt"},
    ),
    Spec(
        "VideoToVideoSDPipeline",
        _unet3d,
        [r"^mid_block.*attentions\.0.*attn1"],
        call={"video": film(3, 16), "strength": 1.0},
        batches=(1, 1),
        warned="cannot be seen",
    ),
    _VARIATION,
    Spec(
        "StableDiffusionControlNetXSPipeline",
        lambda: {
            **_unet(layers_per_block=2)(),
            "controlnet": diffusers.ControlNetXSAdapter.from_unet(
                tiny.unet(layers_per_block=2),
                size_ratio=1,
                conditioning_embedding_out_channels=(2, 2),
            ),
        },
        [r"^down_blocks\.1\.base_attentions\.0\..*attn1"],
        call={**_SMALL, "image": picture(16)},
    ),
    Spec(
        "AudioLDMPipeline",
        also(_audio_unet(), text_encoder=Nothing),
        [r"^mid_block.*\.attn1"],
        prompts=_one_vector,
        setup=lambda pipe: setattr(pipe, "vocoder", _Vocoder()),
        call={"audio_length_in_s": 0.01},
    ),
    Spec(
        "SanaImageToVideoPipeline",
        also(
            model(
                "SanaVideoTransformer3DModel",
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=3,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=DIM,
                sample_size=8,
                patch_size=(1, 2, 2),
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
            vae=wan_vae,
        ),
        _MIDDLE,
        refused="none was seen that mixes tokens of the image",
        copies=1,
        call={
            "frames": 5,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "image": photo(),
        },
    ),
    *variants(
        _Z,
        ZImageControlNetPipeline={
            "parts": also(
                model("ZImageTransformer2DModel", **_Z_IMAGE), vae=vae, controlnet=_z_net
            ),
            "call": {"control_image": picture(16)},
            "shared": False,
            "warned": "residuals of a ControlNet go between the blocks",
        },
    ),
    Spec(
        "LongCatImageEditPipeline",
        also(
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
            vae=lambda: vae(16),
            text_processor=_TextProcessor,
        ),
        _TWO_STACKS,
        text="first",
        image=128,  # with those of the picture
        **_APART,
        setup=_counts_prompts,
        batches=(1, 1),
        call={"image": photo(1, 32)},
    ),
    *variants(
        Spec(
            "",
            lambda: {
                "unet": diffusers.UNet2DConditionModel(
                    **_SIMPLE,
                    in_channels=4,
                    out_channels=8,
                    addition_embed_type="text_image",
                    addition_embed_type_num_heads=2,
                    encoder_hid_dim=24,
                    encoder_hid_dim_type="text_image_proj",
                ),
                "scheduler": diffusers.DDIMScheduler(clip_sample=False),
                "movq": _movq(),
            },
            [r"^down_blocks\.1\.attentions\.0$"],
            text="first",
            image=16,
            prompts=_kandinsky,
            setup=_two_encodings,
            call={**_SMALL, "output_type": "pt"},
            copies=1,
        ),
        KandinskyPipeline={},
        KandinskyImg2ImgPipeline={
            "call": {"image": lambda batch: picture(16, batch), "strength": 1.0}
        },
    ),
]
