"""The denoiser families of diffusers' PAG pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .branches.dit import plan_dit
from .branches.plan import BranchPlan
from .branches.unet import plan_unet
from .processors import (
    PerturbedJointAttention,
    PerturbedLinearAttention,
    PerturbedRotaryAttention,
    PerturbedSelfAttention,
)
from .processors.rows import PerturbedProcessor


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        processor: the attention processor of its perturbed layers.
        plan: builds the branch plan from the model and the names of its perturbed layers.
        text: forward arguments in which uncond and cond differ because their prompts do.
        stock_processors: class names of diffusers' ``(CFG, no CFG)`` pair, for the layers' stock
        cost.
    """

    processor: type[PerturbedProcessor]
    plan: Callable[..., BranchPlan]
    text: frozenset[str]
    stock_processors: tuple[str, str]


_IDENTITY = ("PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0")
_UNET_TEXT = frozenset({"encoder_hidden_states", "image_embeds"})
_PIXART_TEXT = frozenset({"encoder_hidden_states", "encoder_attention_mask"})

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(PerturbedSelfAttention, plan_unet, _UNET_TEXT, _IDENTITY),
    "UNetMotionModel": Family(PerturbedSelfAttention, plan_unet, _UNET_TEXT, _IDENTITY),
    "SD3Transformer2DModel": Family(
        PerturbedJointAttention,
        plan_dit,
        frozenset(),
        ("PAGCFGJointAttnProcessor2_0", "PAGJointAttnProcessor2_0"),
    ),
    "HunyuanDiT2DModel": Family(
        PerturbedRotaryAttention,
        plan_dit,
        frozenset(),
        ("PAGCFGHunyuanAttnProcessor2_0", "PAGHunyuanAttnProcessor2_0"),
    ),
    "PixArtTransformer2DModel": Family(PerturbedSelfAttention, plan_dit, _PIXART_TEXT, _IDENTITY),
    "SanaTransformer2DModel": Family(
        PerturbedLinearAttention,
        plan_dit,
        _PIXART_TEXT,
        ("PAGCFGSanaLinearAttnProcessor2_0", "PAGIdentitySanaLinearAttnProcessor2_0"),
    ),
}

SAG_PIPELINES = ("StableDiffusionSAGPipeline",)

SUPPORTED_PIPELINES = (
    "AnimateDiffPAGPipeline",
    "HunyuanDiTPAGPipeline",
    "KolorsPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
    "StableDiffusion3PAGImg2ImgPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
)


def family_of(model: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        ValueError: a class that none of the supported pipelines uses.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"{type(model).__name__} is none of the supported denoisers: {', '.join(FAMILIES)}."
    )


def uncompiled(module: Any) -> Any:
    """The module itself, where ``torch.compile(module)`` has wrapped it."""
    return getattr(module, "_orig_mod", module)


def has_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` has wrapped the module, or a net of a ``MultiControlNetModel``."""
    inner = uncompiled(module)
    nets = getattr(inner, "nets", ())
    return inner is not module or any(uncompiled(net) is not net for net in nets)


def denoiser_name(pipe: Any) -> str:
    """``"unet"`` or ``"transformer"``: the attribute of ``pipe`` that holds its denoiser.

    Raises:
        ValueError: a pipeline with neither.
    """
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer.")


def controlnets(controlnet: Any) -> Iterable[nn.Module]:
    """The nets of a ``ControlNetModel`` or a ``MultiControlNetModel``."""
    controlnet = uncompiled(controlnet)
    return [uncompiled(net) for net in getattr(controlnet, "nets", [controlnet])]
