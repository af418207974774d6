"""Pipelines with as few blocks as show a fork with something before and behind it, to compile."""

from __future__ import annotations

from typing import Any

import tiny
import tiny_hosts

# with a sampler between the blocks
TWO_BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_ONE_BLOCK = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
# several transformer blocks in one attention
_XL = {
    **_ONE_BLOCK,
    "transformer_layers_per_block": (2,),
    "reverse_transformer_layers_per_block": (1,),
}
_MOTION = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlockMotion",),
    "up_block_types": ("CrossAttnUpBlockMotion",),
}


def _net(unet: dict[str, Any]) -> dict[str, Any]:
    return {key: unet[key] for key in ("block_out_channels", "down_block_types")}


_TWO_LAYERS = ("WanPipeline", "QwenImagePipeline", "LTXPipeline", "CogVideoXPipeline")
SHALLOW = {
    "StableDiffusionPAGPipeline": _ONE_BLOCK,
    "StableDiffusionXLPAGPipeline": _XL,
    "KolorsPAGPipeline": _XL,
    "StableDiffusionXLControlNetPAGPipeline": {
        **_XL,
        "net": {**_net(_XL), "transformer_layers_per_block": (2,)},
    },
    "AnimateDiffPAGPipeline": _MOTION,
    "SanaPAGPipeline": {"num_layers": 3},
    "StableDiffusion3PAGPipeline": {"num_layers": 3},
    "HunyuanDiTPAGPipeline": {"num_layers": 4},
    "PixArtSigmaPAGPipeline": {"num_layers": 3},
    "StableDiffusionControlNetPAGPipeline": {**_ONE_BLOCK, "net": _net(_ONE_BLOCK)},
    # without PAG of their own
    "StableDiffusionPipeline": _ONE_BLOCK,
    "StableDiffusionControlNetPipeline": {**_ONE_BLOCK, "net": _net(_ONE_BLOCK)},
    "StableDiffusion3Pipeline": {"num_layers": 2},
    "FluxPipeline": {"num_layers": 1, "num_single_layers": 2},
    "HunyuanVideoPipeline": {"num_layers": 1, "num_single_layers": 2},
    **{name: {"num_layers": 2} for name in _TWO_LAYERS},
}
_XL_LAYERS = {
    "middle": ["down_blocks.0.attentions.0.transformer_blocks.1", "mid"],
    "last": ["up_blocks.0.attentions.1"],
}
_UNET = {
    "middle": ["down_blocks.0.attentions.0", "mid", "up_blocks.0.attentions.1"],
    "last": ["up_blocks.0.attentions.1"],
}
_DIT = {"middle": [r"blocks\.1\.", r"blocks\.2\."], "last": [r"blocks\.2\."]}
# sets of layers as in tiny.py: a middle set, and the last layer in execution order
LAYERS = {
    "StableDiffusionPAGPipeline": _UNET,
    "StableDiffusionControlNetPAGPipeline": _UNET,
    "StableDiffusionXLPAGPipeline": _XL_LAYERS,
    "StableDiffusionXLControlNetPAGPipeline": _XL_LAYERS,
    "KolorsPAGPipeline": _XL_LAYERS,
    "AnimateDiffPAGPipeline": {**_UNET, "last": ["up_blocks.0.motion_modules.1"]},
    "SanaPAGPipeline": _DIT,
    "StableDiffusion3PAGPipeline": _DIT,
    "HunyuanDiTPAGPipeline": {**_DIT, "last": [r"blocks\.3\."]},
    "PixArtSigmaPAGPipeline": _DIT,
    "StableDiffusionPipeline": {"middle": ["mid", "up_blocks.0.attentions.1"]},
    "StableDiffusion3Pipeline": {"middle": [r"blocks\.1\."]},
    "FluxPipeline": {"middle": [r"single_transformer_blocks\.1\."]},
    "HunyuanVideoPipeline": {"middle": [r"single_transformer_blocks\.1\."]},
    **{name: {"middle": [r"blocks\.1\."]} for name in _TWO_LAYERS},
}


_NETS = ("Union", "Adapter", "DiffControlNet", "VideoToVideoControlNet", "SanaControlNet")


def family(name: str) -> str:
    """The pipeline in ``SHALLOW`` with the same denoiser and ControlNet, or ``name`` itself.

    A host with a ControlNet or an adapter that its PAG pipeline has not is as deep as these.
    """
    host = tiny_hosts.HOSTS.get(name)
    if name in SHALLOW or (host and any(part in name for part in _NETS)):
        return name
    if host and not host.like:
        return host.family
    spec = tiny.PIPELINES[host.like if host else name]
    for other in LAYERS:
        known = tiny.PIPELINES.get(other)
        if known and (known.model, known.xl, known.controlnet) == (
            spec.model,
            spec.xl,
            spec.controlnet,
        ):
            return other
    return name


def build(name: str, **options: Any) -> Any:
    """The pipeline ``name`` of ``tiny.py`` or ``tiny_hosts``, shallow where there is a way."""
    made = tiny_hosts if name in tiny_hosts.HOSTS else tiny
    return made.build(name, **{**SHALLOW.get(family(name), {}), **options})


_UP = {**_ONE_BLOCK, "down_block_types": ("DownBlock2D",), "mid_block_type": None}
_TWO_STACKS = {"num_layers": 1, "num_single_layers": 1}
# what is least of each, where it is not one block
_LEAST = {
    "StableDiffusionPAGPipeline": _UP,
    "StableDiffusionPipeline": _UP,
    "StableDiffusionControlNetPAGPipeline": {**_UP, "net": _net(_UP)},
    "StableDiffusionControlNetPipeline": {**_UP, "net": _net(_UP)},
    "AnimateDiffPAGPipeline": {**_MOTION, "down_block_types": ("DownBlockMotion",)},
    "HunyuanDiTPAGPipeline": {"num_layers": 2},  # one with a skip from another
    "FluxPipeline": _TWO_STACKS,
    "HunyuanVideoPipeline": _TWO_STACKS,
    "ChromaPipeline": _TWO_STACKS,
    "Flux2Pipeline": _TWO_STACKS,
    "ZImagePipeline": {"n_layers": 1},
}


def least(name: str) -> tuple[Any, list[str]]:
    """A pipeline with as little as can be perturbed, to compile it, and the names of its layers.

    It is one block of each kind, or two attentions behind each other in a UNet.
    """
    options = _LEAST.get(name, {"num_layers": 1})
    if "up_block_types" in options:
        layers = ["up_blocks.0.attentions.1"]
    else:
        in_layers = name in ("Lumina2Pipeline", "ZImagePipeline")
        layers = [r"^layers\.0\." if in_layers else r"blocks\.0\."]
    own = {} if name in tiny_hosts.HOSTS else {"pag_applied_layers": layers}
    return build(name, **options, **own), layers
