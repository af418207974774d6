"""Pipelines that know nothing of PAG, and what has to be known of them to add it.

Their denoiser is called with ``[uncond | cond]`` (or with the one, then with the other), and its
output goes into the pipeline's own CFG. So PAG is added in between: the denoiser runs
``[uncond | cond | perturbed]`` and hands out ``[uncond | cond']`` with

    cond' = cond + (s/g)·(cond − perturbed)

of which CFG with scale g makes ``uncond + g·(cond − uncond) + s·(cond − perturbed)``. Without CFG,
and for guidance-distilled models, ``g`` is 1. Where nobody knows ``g`` before CFG is applied,
``s·(cond − perturbed)`` is added to uncond *and* cond: that comes to the same for every ``g``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.registry import denoiser_name

Arguments = dict[str, Any]
"""The arguments of the pipeline's call, defaults included."""


@dataclass(frozen=True)
class Host:
    """What PAG has to know of a pipeline that does not know PAG.

    Attributes:
        cfg: whether a call uses CFG.
        scale: its CFG scale in a step, where it uses CFG, from the pipeline, the call's arguments,
            the step's number and the name of the denoiser; ``None`` where it is not known yet.
        layers: layers that are perturbed unless others are chosen.
        source: where that choice comes from.
        sequential: uncond and cond are two calls of the denoiser, cond first.
        denoisers: attributes that hold the denoisers.
    """

    cfg: Callable[[Any, Arguments], bool]
    scale: Callable[[Any, Arguments, int, str], float | None]
    layers: tuple[str, ...]
    source: str
    sequential: bool = False
    denoisers: tuple[str, ...] = ("transformer",)
    guidance: str = "linear"
    name: str = ""


def _property_cfg(pipe: Any, arguments: Arguments) -> bool:
    return bool(pipe.do_classifier_free_guidance)


def _property_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    return float(pipe.guidance_scale)


def _argument_cfg(pipe: Any, arguments: Arguments) -> bool:
    return float(arguments["guidance_scale"]) > 1.0


def _argument_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    return float(arguments["guidance_scale"])


def _dynamic_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    # CogVideoX decides on a step's scale behind the denoiser
    return None if arguments.get("use_dynamic_cfg") else float(arguments["guidance_scale"])


def _true_cfg(pipe: Any, arguments: Arguments) -> bool:
    if float(arguments["true_cfg_scale"]) <= 1.0:
        return False
    # Flux and HunyuanVideo need both parts of a negative prompt, Qwen-Image has one
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = [arguments[name] is not None for name in names if name in arguments]
    return arguments["negative_prompt"] is not None or all(embeds)


def _true_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    return float(arguments["true_cfg_scale"])


def _wan_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    second = getattr(pipe, "_guidance_scale_2", None) if denoiser == "transformer_2" else None
    return float(pipe._guidance_scale if second is None else second)


def _lumina_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    truncated = (step + 1) / arguments["num_inference_steps"] > arguments["cfg_trunc_ratio"]
    return 1.0 if truncated else float(arguments["guidance_scale"])


_PAPER = "PAG, arXiv 2403.17377"
_UNTESTED = "untested: two thirds of the way through, where shared blocks make PAG cheap"


def _unet(*layers: str) -> Host:
    return Host(_property_cfg, _property_scale, layers, _PAPER, denoisers=("unet",))


def _transformer(layers: str, source: str) -> Host:
    return Host(_property_cfg, _property_scale, (layers,), source)


def _argument(layers: str, source: str) -> Host:
    return Host(_argument_cfg, _argument_scale, (layers,), source)


_SD, _SD3 = _unet("mid"), _transformer("blocks.13", "diffusers #8861")
_FLUX = Host(
    _true_cfg,
    _true_scale,
    ("single_transformer_blocks.0",),
    "ComfyUI-Fluxtapoz, PAGAttention",
    sequential=True,
)
_PIXART = _argument("blocks.14", "diffusers #8936")

HOSTS: dict[str, Host] = {
    "AnimateDiffPipeline": _unet("mid_block.*attn1"),
    "CogVideoXPipeline": Host(
        _argument_cfg, _dynamic_scale, ("blocks.11",), "STG, arXiv 2411.18664"
    ),
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "FluxPipeline": _FLUX,
    "HunyuanDiTPipeline": _transformer("blocks.14", "diffusers #8936"),
    "HunyuanVideoPipeline": Host(
        _true_cfg, _true_scale, (r"^transformer_blocks\.2\.",), "STG, arXiv 2411.18664", True
    ),
    "KolorsPipeline": _unet("mid"),
    "LTXPipeline": _transformer("blocks.19", "LTX-Video 2B's own configuration of STG"),
    "Lumina2Pipeline": Host(
        _property_cfg, _lumina_scale, (r"^layers\.17\.",), _UNTESTED, True, guidance="normalised"
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "QwenImageImg2ImgPipeline": Host(
        _true_cfg,
        _true_scale,
        ("blocks.40",),
        _UNTESTED,
        sequential=True,
        guidance="normalised",
    ),
    "QwenImagePipeline": Host(
        _true_cfg,
        _true_scale,
        ("blocks.40",),
        _UNTESTED,
        sequential=True,
        guidance="normalised",
    ),
    "SanaPipeline": _transformer("blocks.8", "NVlabs/Sana"),
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusionControlNetImg2ImgPipeline": _SD,
    "StableDiffusionControlNetInpaintPipeline": _SD,
    "StableDiffusionControlNetPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLControlNetImg2ImgPipeline": _SD,
    "StableDiffusionXLControlNetInpaintPipeline": _SD,
    "StableDiffusionXLControlNetPipeline": _SD,
    "StableDiffusionXLImg2ImgPipeline": _SD,
    "StableDiffusionXLInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SD,
    "WanPipeline": Host(
        _property_cfg,
        _wan_scale,
        (r"^blocks\.8\.",),
        "STG, diffusers' community pipeline_stg_wan",
        sequential=True,
        denoisers=("transformer", "transformer_2"),
    ),
}


def host_of(pipe: Any) -> Host | None:
    """The host of a pipeline; ``None`` where it has PAG itself, or is none that is known."""
    # a PAG pipeline can have one of these among its bases, and comes first then
    for cls in type(pipe).__mro__:
        if "PAG" in cls.__name__:
            return None
        if cls.__name__ in HOSTS:
            return dataclasses.replace(HOSTS[cls.__name__], name=cls.__name__)
    return None


def denoiser_names(pipe: Any) -> tuple[str, ...]:
    """The attributes of ``pipe`` that hold its denoisers."""
    host = host_of(pipe)
    if host is None:
        return (denoiser_name(pipe),)
    return tuple(name for name in host.denoisers if getattr(pipe, name, None) is not None)
