"""Hosts whose denoiser is a transformer, of pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny

from tiny_hosts.spec import (
    EDITED,
    FROM_PICTURE,
    SIZE,
    HostSpec,
    blocks,
    like,
    mask,
    photo,
    picture,
    variants,
)

_KONTEXT = {
    **SIZE,
    "image": picture(),
    "max_area": tiny.SIZE**2,
    "_auto_resize": False,
}
_EDIT = {"height": EDITED, "width": EDITED, "image": photo()}
_SPRINT: dict[str, Any] = {
    "cfg": "",
    "model": {"guidance_embeds": True},
    "without": ("negative_prompt", "negative_prompt_embeds", "negative_prompt_attention_mask"),
}
_CONTROL = {"model": {"in_channels": 32, "out_channels": 16}}  # latents, and those of a picture
_TWO_STACKS = [r"^transformer_blocks\.1\.", r"single_transformer_blocks\.1\."]


def _distilled(name: str, middle: list[str], **more: Any) -> HostSpec:
    layers = blocks(middle, "attn")
    return HostSpec(name, layers, "first", cfg="true_cfg_scale", apart=True, **more)


_NO_CFG = {"cfg": "", "apart": False}
FLUX = _distilled("FluxPipeline", _TWO_STACKS)
QWEN = _distilled("QwenImagePipeline", [r"blocks\.1\.", r"blocks\.2\."])


SPECS = [
    like("StableDiffusion3Pipeline", text="last"),
    like("StableDiffusion3Img2ImgPipeline", text="last"),
    like(
        "StableDiffusion3InpaintPipeline",
        text="last",
        pag="StableDiffusion3PAGImg2ImgPipeline",
        model={"in_channels": 16, "out_channels": 16},
        call={"mask_image": mask()},
    ),
    like("HunyuanDiTPipeline"),
    like("PixArtSigmaPipeline"),
    like("PixArtAlphaPipeline", pag="PixArtSigmaPAGPipeline"),
    like("SanaPipeline"),
    *variants(
        like("SanaPipeline"),
        SanaSprintPipeline={
            **_SPRINT,
            "call": {"intermediate_timesteps": None},
        },
        SanaSprintImg2ImgPipeline={
            **_SPRINT,
            "call": {"image": picture(), "strength": 1.0, "intermediate_timesteps": None},
        },
    ),
    FLUX,
    *variants(
        FLUX,
        FluxImg2ImgPipeline={"call": FROM_PICTURE},
        FluxInpaintPipeline={"call": {**FROM_PICTURE, "mask_image": mask()}},
        FluxKontextPipeline={"call": _KONTEXT},
        FluxKontextInpaintPipeline={"call": {**_KONTEXT, "mask_image": mask(), "strength": 1.0}},
        FluxFillPipeline={
            **_NO_CFG,
            "call": {**FROM_PICTURE, "mask_image": mask()},
            "model": {"in_channels": 48, "out_channels": 16},
        },
        FluxControlPipeline={
            **_NO_CFG,
            **_CONTROL,
            "call": {**SIZE, "control_image": picture()},
        },
        FluxControlImg2ImgPipeline={
            **_NO_CFG,
            **_CONTROL,
            "call": {**FROM_PICTURE, "control_image": picture()},
        },
        FluxControlInpaintPipeline={
            **_NO_CFG,
            **_CONTROL,
            "call": {**FROM_PICTURE, "control_image": picture(), "mask_image": mask()},
        },
    ),
    QWEN,
    *variants(
        QWEN,
        QwenImageImg2ImgPipeline={"call": FROM_PICTURE},
        QwenImageInpaintPipeline={"call": {**FROM_PICTURE, "mask_image": mask()}},
        QwenImageEditPipeline={"call": _EDIT},
        QwenImageEditPlusPipeline={
            "call": {**_EDIT, "image": [photo(), photo(2)]},
            "model": {"zero_cond_t": True},
            "batches": (1,),
        },
        QwenImageEditInpaintPipeline={
            "call": {**_EDIT, "mask_image": photo(), "strength": 1.0},
        },
        QwenImageLayeredPipeline={
            # as pictures: diffusers has no latents to give here
            "call": {"image": photo(), "prompt": "layers", "layers": 1, "output_type": "pt"},
            "model": {"use_layer3d_rope": True, "use_additional_t_cond": True},
            "batches": (1,),
            "without": ("height", "width"),
        },
    ),
    HostSpec(
        "Lumina2Pipeline",
        blocks([r"layers\.1\.", r"layers\.2\."], "layers"),
        text="first",
        apart=True,
    ),
]


def flux(**overrides: Any) -> Any:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return diffusers.FluxTransformer2DModel(**{**config, **overrides})


def qwen(**overrides: Any) -> Any:
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (2, 2, 4),
    }
    return diffusers.QwenImageTransformer2DModel(**{**config, **overrides})


def lumina2(**overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 12,
    }
    return diffusers.Lumina2Transformer2DModel(**{**config, **overrides})


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


# the class of the pipeline's own VAE, where its loop needs one
VAES = {
    **dict.fromkeys(
        (
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxKontextPipeline",
            "FluxKontextInpaintPipeline",
            "FluxFillPipeline",
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
        ),
        tiny.vae,
    ),
    **dict.fromkeys(
        (
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageLayeredPipeline",
        ),
        qwen_vae,
    ),
    "StableDiffusion3InpaintPipeline": lambda: tiny.vae(latent_channels=16),
}
# components that the PAG pipeline has not, or has others of
PARTS: dict[str, Any] = {
    "SanaSprintPipeline": lambda: {"scheduler": diffusers.SCMScheduler()},
    "SanaSprintImg2ImgPipeline": lambda: {"scheduler": diffusers.SCMScheduler()},
    # nothing but its dtype is asked for
    "QwenImageLayeredPipeline": lambda: {"text_encoder": tiny.vae()},
}
MODELS = {"FluxPipeline": flux, "QwenImagePipeline": qwen, "Lumina2Pipeline": lumina2}
