"""The denoiser families: what is done with each class of model, and which pipelines have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..processors import (
    PerturbedCogVideoXAttention,
    PerturbedFluxAttention,
    PerturbedHunyuanVideoAttention,
    PerturbedJointAttention,
    PerturbedLinearAttention,
    PerturbedLTXAttention,
    PerturbedLuminaAttention,
    PerturbedQwenAttention,
    PerturbedRotaryAttention,
    PerturbedSelfAttention,
    PerturbedVideoAttention,
)
from ..processors.rows import PerturbedProcessor
from ..sharing.dit_plan import plan_dit
from ..sharing.plan import BranchPlan
from ..sharing.unet_plan import plan_unet

UNCOND, COND, PERTURBED = "uncond", "cond", "perturbed"
"""The branches of a batch, in their order."""


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        processor: the attention processor of its perturbed layers.
        plan: builds the branch plan from the model and the names of its perturbed layers.
        text: forward arguments in which uncond and cond differ because their prompts do.
        stock_processors: class names of diffusers' ``(CFG, no CFG)`` pair of PAG processors, if it
            has one.
        replaces: class names of the processors whose arithmetic ours repeats; empty: any.
        sequence: ``(text tokens of each sample, image tokens)`` from the model and its arguments,
            where blocks get both as one sequence.
    """

    processor: type[PerturbedProcessor]
    plan: Callable[..., BranchPlan]
    text: frozenset[str]
    stock_processors: tuple[str, str] | None = None
    replaces: frozenset[str] = frozenset()
    sequence: Callable[[Any, dict[str, Any]], tuple[tuple[int, ...], int]] | None = None


_IDENTITY = ("PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0")
_UNET_TEXT = frozenset({"encoder_hidden_states", "image_embeds"})
_PIXART_TEXT = frozenset({"encoder_hidden_states", "encoder_attention_mask"})


def _flux_sequence(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    text = call["encoder_hidden_states"].shape[1]
    return (text,), call["hidden_states"].shape[1]


def _lumina_sequence(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    patch = model.config.patch_size
    height, width = call["hidden_states"].shape[-2:]
    # the model reads these lengths from the device in every forward, too
    text = call["encoder_attention_mask"].sum(dim=1).tolist()
    return tuple(map(int, text)), (height // patch) * (width // patch)


def _dit(processor: type[PerturbedProcessor], *replaces: str, **more: Any) -> Family:
    text = more.pop("text", frozenset())
    return Family(processor, plan_dit, text, replaces=frozenset(replaces), **more)


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
    "FluxTransformer2DModel": _dit(
        PerturbedFluxAttention,
        "FluxAttnProcessor",
        "FluxAttnProcessor2_0",
        "FusedFluxAttnProcessor2_0",
        sequence=_flux_sequence,
    ),
    "QwenImageTransformer2DModel": _dit(PerturbedQwenAttention, "QwenDoubleStreamAttnProcessor2_0"),
    "WanTransformer3DModel": _dit(
        PerturbedVideoAttention,
        "WanAttnProcessor",
        "WanAttnProcessor2_0",
        text=frozenset({"encoder_hidden_states"}),
    ),
    "LTXVideoTransformer3DModel": _dit(
        PerturbedLTXAttention,
        "LTXVideoAttnProcessor",
        "LTXVideoAttentionProcessor2_0",
        text=_PIXART_TEXT,
    ),
    "CogVideoXTransformer3DModel": _dit(
        PerturbedCogVideoXAttention, "CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"
    ),
    "HunyuanVideoTransformer3DModel": _dit(
        PerturbedHunyuanVideoAttention, "HunyuanVideoAttnProcessor2_0"
    ),
    "Lumina2Transformer2DModel": _dit(
        PerturbedLuminaAttention, "Lumina2AttnProcessor2_0", sequence=_lumina_sequence
    ),
}

SAG_PIPELINES = ("StableDiffusionSAGPipeline",)

PAG_PIPELINES = (
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
