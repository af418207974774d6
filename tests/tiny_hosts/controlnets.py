"""Hosts with a ControlNet whose denoiser is a transformer: its residuals go between blocks."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import tiny

from tiny_hosts import images
from tiny_hosts.spec import FROM_PICTURE, SIZE, like, mask, picture, variants

_CONTROL = {**SIZE, "control_image": picture()}
_NO_CFG = {"cfg": "", "apart": False}
_SD3_INPAINT = {
    "call": {**_CONTROL, "control_mask": mask()},
}


SPECS = [
    *variants(like("SanaPipeline"), SanaControlNetPipeline={"call": {"control_image": picture()}}),
    *variants(
        like("StableDiffusion3Pipeline", text="last"),
        StableDiffusion3ControlNetPipeline={"call": _CONTROL},
        StableDiffusion3ControlNetInpaintingPipeline=_SD3_INPAINT,
    ),
    *variants(like("HunyuanDiTPipeline"), HunyuanDiTControlNetPipeline={"call": _CONTROL}),
    *variants(
        images.FLUX,
        FluxControlNetPipeline={"call": _CONTROL},
        FluxControlNetImg2ImgPipeline={
            **_NO_CFG,
            "call": {**FROM_PICTURE, "control_image": picture()},
        },
        FluxControlNetInpaintPipeline={
            **_NO_CFG,
            "call": {**FROM_PICTURE, "control_image": picture(), "mask_image": mask()},
        },
    ),
    *variants(
        images.QWEN,
        QwenImageControlNetPipeline={"call": _CONTROL},
        QwenImageControlNetInpaintPipeline={"call": {**_CONTROL, "control_mask": mask()}},
    ),
]


def net(cls: Any, denoiser: Any, **own: Any) -> Any:
    """A ControlNet with what it has in common with a denoiser's configuration."""
    names = inspect.signature(cls.__init__).parameters
    config = {k: v for k, v in denoiser.config.items() if k in names and not k.startswith("_")}
    return cls(**{**config, **own})


def _net(cls: Any, denoiser: Any, **own: Any) -> Any:
    return tiny.randomise(net(cls, denoiser, **own))


def sana_net() -> Any:
    return _net(diffusers.SanaControlNetModel, tiny.sana(), num_layers=4)


def sd3_net(**own: Any) -> Any:
    """Two residuals, each for a half of six blocks."""
    return _net(diffusers.SD3ControlNetModel, tiny.sd3(), **{"num_layers": 2, **own})


def hunyuan_net() -> Any:
    """Of two blocks, as six blocks have two long skips."""
    own = {"transformer_num_layers": 6}
    return _net(diffusers.HunyuanDiT2DControlNetModel, tiny.hunyuan(), **own)


def flux_net(**own: Any) -> Any:
    """Two residuals for three blocks of each kind."""
    own = {"num_layers": 2, "num_single_layers": 2, **own}
    return _net(diffusers.FluxControlNetModel, images.flux(), **own)


def qwen_net(**own: Any) -> Any:
    """Three residuals for four blocks: the last is not used."""
    return _net(diffusers.QwenImageControlNetModel, images.qwen(), **{"num_layers": 3, **own})


def _parts(make: Any, **own: Any) -> Any:
    return lambda: {"controlnet": make(**own)}


VAES = {
    **dict.fromkeys(
        (
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        ),
        tiny.vae,
    ),
    **dict.fromkeys(
        ("QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline"), images.qwen_vae
    ),
}
PARTS: dict[str, Any] = {
    "SanaControlNetPipeline": _parts(sana_net),
    "StableDiffusion3ControlNetPipeline": _parts(sd3_net),
    # beside the latents of the picture a mask
    "StableDiffusion3ControlNetInpaintingPipeline": _parts(sd3_net, extra_conditioning_channels=1),
    "HunyuanDiTControlNetPipeline": _parts(hunyuan_net),
    "FluxControlNetPipeline": _parts(flux_net),
    "FluxControlNetImg2ImgPipeline": _parts(flux_net),
    "FluxControlNetInpaintPipeline": _parts(flux_net),
    "QwenImageControlNetPipeline": _parts(qwen_net),
    "QwenImageControlNetInpaintPipeline": _parts(qwen_net, extra_condition_channels=4),
}
