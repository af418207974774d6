"""Published models in their widths with few layers, for counting on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pag_fast.analysis.published import CARDS, ModelCard

_UNET: dict[str, Any] = {
    "block_out_channels": (320, 1280),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_MOTION_UNET = {
    **_UNET,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
_XL_UNET = {
    "block_out_channels": (320, 1280),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 20),
    "transformer_layers_per_block": (1, 2),
}
# few layers, in which what is computed in vain at a fork weighs more: of a denoiser or a ControlNet
_SHALLOW: dict[str, dict[str, Any]] = {
    "StableDiffusionPAG": _UNET,
    "StableDiffusionControlNetPAG": _UNET,
    "AnimateDiffPAG": _MOTION_UNET,
    "StableDiffusionXL": _XL_UNET,
    "KolorsPAG": _XL_UNET,
    "StableDiffusion3PAG": {"num_layers": 4},
    "HunyuanDiTPAG": {"num_layers": 6},
    "PixArtSigmaPAG": {"num_layers": 4},
    "SanaPAG": {"num_layers": 4},
    "FluxPipeline": {"num_layers": 3, "num_single_layers": 3},
    "QwenImagePipeline": {"num_layers": 6},
    "WanPipeline": {"num_layers": 4},
    "LTXPipeline": {"num_layers": 5},
    "CogVideoXPipeline": {"num_layers": 5},
    "HunyuanVideoPipeline": {"num_layers": 3, "num_single_layers": 3},
    "Lumina2Pipeline": {"num_layers": 4},
    "CogView4Pipeline": {"num_layers": 4},
    "Flux2KleinPipeline": {"num_layers": 3, "num_single_layers": 3},
    "ZImagePipeline": {"n_layers": 4},
    "Krea2Pipeline": {"num_layers": 6},
    "HiDreamImagePipeline": {
        "num_layers": 3,
        "num_single_layers": 3,
        "llama_layers": list(range(6)),
    },
    "HunyuanVideo15Pipeline": {"num_layers": 3},
    "WanVACEPipeline": {"num_layers": 4, "vace_layers": [0, 2]},
}


def shallow_card(name: str) -> ModelCard:
    """The published card of a pipeline, with few layers."""
    card = CARDS[name]
    (fewer,) = (v for k, v in _SHALLOW.items() if name.startswith(k))
    net = card.controlnet
    if net is not None:
        net = {**net, **{key: x for key, x in fewer.items() if key != "up_block_types"}}
    return replace(card, config={**card.config, **fewer}, controlnet=net)
