"""Pipelines with a UNet, of known and unknown classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import tiny
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from sweep.spec import (
    DIM,
    TOKENS,
    Nothing,
    Spec,
    normal,
    photo,
    picture,
    vae,
    variants,
)

_SMALL = {"height": 16, "width": 16}
_MID = [r"^down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1", r"^mid_block.*\.attn1"]


def _ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **config)


def _unet(**config: Any) -> Any:
    def make() -> dict[str, Any]:
        return {"unet": tiny.unet(**config), "scheduler": _ddim(), "vae": vae()}

    return make


def _more(parts: Any, **more: Any) -> Any:
    return lambda: {**parts(), **{name: make() for name, make in more.items()}}


_SD = Spec("", _unet(), _MID, call=_SMALL)


def _image_embeds(prefix: str, batch: int) -> dict[str, Any]:
    """Of both, whether CFG is on or not."""
    return {
        "image_embeds": normal(1, batch, 24),
        "negative_image_embeds": normal(2, batch, 24),
    }


def _with_masks(prefix: str, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TOKENS)
    mask[0, -2:] = 0
    embeds = normal(2 if prefix else 1, batch, TOKENS, DIM)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}attention_mask": mask}


# ---- DeepFloyd IF ----

_SIMPLE: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
_IF_CONFIG: dict[str, Any] = {
    **_SIMPLE,
    "in_channels": 3,
    "out_channels": 6,
    "encoder_hid_dim": DIM,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
}


def _if_unet(**config: Any) -> Any:
    def make() -> dict[str, Any]:
        noising = {"image_noising_scheduler": diffusers.DDPMScheduler()} if config else {}
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
        unet = diffusers.UNet2DConditionModel(**{**_IF_CONFIG, **config})
        return {"unet": unet, "scheduler": scheduler, **noising}

    return make


def _of(size: int) -> Any:
    return lambda batch: picture(size, batch)


def _mask_of(size: int) -> Any:
    return lambda batch: picture(size, batch)[:, :1].round()


_SUPER = {"in_channels": 6, "class_embed_type": "timestep"}
_IF = Spec(
    "IFPipeline",
    _if_unet(),
    [r"^down_blocks\.1\.attentions\.0$", r"^mid_block\.attentions\.0$"],
    text="first",
    image=64,
    call={**_SMALL, "output_type": "pt"},
    # of the variance that it predicts, too, it takes cond's
    everywhere=True,
    warned="does more to the predictions",
)


# ---- Kandinsky ----


def _movq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def _kandinsky22(**config: Any) -> Any:
    own = {
        **_SIMPLE,
        "in_channels": 4,
        "out_channels": 8,
        "addition_embed_type": "image",
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "image_proj",
    }

    def make() -> dict[str, Any]:
        unet = diffusers.UNet2DConditionModel(**{**own, **config})
        return {"unet": unet, "scheduler": _ddim(), "movq": _movq()}

    return make


_KANDINSKY = Spec(
    "KandinskyV22Pipeline",
    _kandinsky22(),
    [r"^down_blocks\.1\.attentions\.0$", r"^mid_block\.attentions\.0$"],
    text="first",
    image=16,
    prompts=_image_embeds,
    copies=1,
    call=_SMALL,
)


def _vae8() -> Any:
    """Of factor eight."""
    return vae(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


class _Tokens(dict):
    """Of a phrase."""

    def to(self, device: Any) -> Any:
        return self


def _phrases(pipe: Any) -> None:
    class Encoder(Nothing):
        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(pooler_output=normal(7, 1, DIM))

    pipe.text_encoder = Encoder()
    pipe.tokenizer = lambda *_, **__: _Tokens()


SPECS = [
    *variants(
        _SD,
        AltDiffusionPipeline={},
        AltDiffusionImg2ImgPipeline={"call": {"image": picture(16), "strength": 1.0}},
        StableDiffusionDepth2ImgPipeline={
            "parts": _unet(in_channels=5),
            "call": {"image": picture(16), "depth_map": picture(16)[:, 0], "strength": 1.0},
        },
        StableDiffusionLDM3DPipeline={
            "parts": _more(_unet(), vae=lambda: vae(out_channels=6, in_channels=6)),
            "call": {"output_type": "np"},
        },
        StableDiffusionPanoramaPipeline={
            "parts": _more(_unet(), vae=_vae8),
            "call": {"height": 64, "width": 576},
            "batches": (1, 1),  # of two prompts it mixes the rows
            # a prediction for each view, of which nothing shows what becomes
            "warned_without": "more than once for cond in a step",
        },
        StableDiffusionInpaintPipelineLegacy={
            "call": {"image": photo(1, 16), "mask_image": photo(2, 16), "strength": 1.0}
        },
        StableDiffusionModelEditingPipeline={},
        StableDiffusionParadigmsPipeline={
            "parts": _more(_unet(), scheduler=diffusers.DDIMParallelScheduler),
            # several steps run in parallel
            "refused": "runs 4 branches in one batch|its loop shows neither",
        },
        StableDiffusionUpscalePipeline={
            "parts": _more(
                _unet(in_channels=7, num_class_embeds=100),
                low_res_scheduler=diffusers.DDPMScheduler,
            ),
            "call": {"image": lambda batch: picture(8, batch)},
        },
        StableDiffusionGLIGENPipeline={
            "parts": _unet(attention_type="gated"),
            "call": {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.2, 0.2, 0.8, 0.8]]},
            "setup": _phrases,
        },
        StableUnCLIPImg2ImgPipeline={
            "parts": _more(
                _unet(class_embed_type="projection", projection_class_embeddings_input_dim=48),
                image_noising_scheduler=diffusers.DDPMScheduler,
                image_encoder=Nothing,
                image_normalizer=lambda: StableUnCLIPImageNormalizer(24),
            ),
            "call": {"image_embeds": lambda batch: normal(5, batch, 24)},
        },
    ),
    Spec(
        "TextToVideoSDPipeline",
        lambda: {
            "unet": diffusers.UNet3DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                cross_attention_dim=DIM,
                attention_head_dim=4,
                norm_num_groups=4,
            ),
            "scheduler": _ddim(),
            "vae": vae(),
        },
        [r"^mid_block.*attentions\.0.*attn1"],
        call={**_SMALL, "num_frames": 3},
        warned="cannot be seen",  # it is combined with frames as rows
    ),
    _IF,
    *variants(
        _IF,
        IFImg2ImgPipeline={"call": {"image": _of(16), "strength": 1.0}},
        IFInpaintingPipeline={
            "call": {"image": _of(16), "mask_image": _mask_of(16), "strength": 1.0}
        },
        IFSuperResolutionPipeline={"parts": _if_unet(**_SUPER), "call": {"image": _of(8)}},
        IFImg2ImgSuperResolutionPipeline={
            "parts": _if_unet(**_SUPER),
            "call": {"image": _of(8), "original_image": _of(16), "strength": 1.0},
        },
        IFInpaintingSuperResolutionPipeline={
            "parts": _if_unet(**_SUPER),
            "call": {
                "image": _of(8),
                "original_image": _of(16),
                "mask_image": _mask_of(16),
                "strength": 1.0,
            },
        },
    ),
    _KANDINSKY,
    *variants(
        _KANDINSKY,
        KandinskyV22Img2ImgPipeline={"call": {"image": picture(16), "strength": 1.0}},
        KandinskyV22InpaintPipeline={
            "parts": _kandinsky22(in_channels=9),
            "call": {"image": picture(16), "mask_image": picture(16)[:, :1]},
            "batches": (1, 1),
        },
        KandinskyV22ControlnetPipeline={
            "parts": _kandinsky22(in_channels=8, addition_embed_type="image_hint"),
            "call": {"hint": lambda batch: picture(64, batch), "output_type": "pt"},
        },
        KandinskyV22ControlnetImg2ImgPipeline={
            "parts": _kandinsky22(in_channels=8, addition_embed_type="image_hint"),
            "call": {
                "image": picture(16),
                "hint": lambda batch: picture(64, batch),
                "strength": 1.0,
                "output_type": "pt",
            },
        },
    ),
    Spec(
        "Kandinsky3Pipeline",
        lambda: {
            "unet": diffusers.Kandinsky3UNet(
                in_channels=4,
                time_embedding_dim=8,
                groups=2,
                attention_head_dim=4,
                layers_per_block=2,
                block_out_channels=(32, 64),
                cross_attention_dim=8,
                encoder_hid_dim=DIM,
            ),
            "scheduler": diffusers.DDPMScheduler(),
            "movq": _movq(),
        },
        [r"^down_blocks\.1\.attentions\.0\.attention"],
        prompts=_with_masks,
        weight=lambda scale: 1.0 + scale,
        call=_SMALL,
    ),
]
