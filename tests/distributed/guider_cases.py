"""Guiders of modular pipelines on every rank: the model on one process, then on all."""

from __future__ import annotations

from typing import Any

import modular
import torch
from context_cases import WAYS, prepare
from diffusers import ContextParallelConfig
from diffusers.hooks import LayerSkipConfig

from pag_fast.guiders import PerturbedAttentionGuidance, SkipLayerGuidance


def guiders(name: str) -> dict[str, Any]:
    """Attention perturbed in the middle and from the first layer on; blocks and parts skipped."""
    stack = "blocks" if name == "wan" else "transformer_blocks"
    every = "attn1" if name == "wan" else "attn"
    pag, skip = modular.ALWAYS, modular.SLG_ALWAYS

    def skipping(**parts: Any) -> SkipLayerGuidance:
        return SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0, 1], stack, **parts), **skip)

    return {
        "attention": PerturbedAttentionGuidance(**pag),
        "all attention": PerturbedAttentionGuidance(perturbed_guidance_layers=[every], **pag),
        "blocks": skipping(),
        "one block": SkipLayerGuidance(skip_layer_guidance_layers=1, **skip),
        "parts": skipping(skip_attention=True, skip_ff=False),
        "scores": skipping(skip_attention=False, skip_ff=True, skip_attention_scores=True),
    }


def _case(name: str, way: str = "ulysses") -> modular.Case:
    """With five tokens of text, or with six, which two ranks can share equally."""
    case = modular.new_case(name)
    if "uneven" in way:
        return case
    for key, pair in case.pairs.items():
        if key.startswith("encoder"):
            cond, uncond = (torch.cat([x, x[:, -1:]], dim=1) for x in pair)
            case.pairs[key] = cond, uncond
    if "txt_ids" in case.fixed:
        case.fixed["txt_ids"] = torch.zeros(6, 3)
    return case


def exact(_: Any, name: str) -> dict[str, Any]:
    """Of every case the difference between one process and two, the guider's own, and warnings."""
    prepare()
    found = {}
    for label in guiders(name):
        # a ring takes no masks
        ways = tuple(WAYS) if label == "attention" and name != "qwen" else tuple(WAYS)[::2]
        for way in ways:
            guider, off = guiders(name)[label], guiders(name)[label]
            off.skip_layer_guidance_scale = 0.0
            alone = modular.denoise(_case(name, way), guider)
            plain = modular.denoise(_case(name, way), off)
            case, guider = _case(name, way), guiders(name)[label]
            case.model.enable_parallelism(config=ContextParallelConfig(**WAYS[way]))
            result = modular.denoise(case, guider)
            pairs = (result, alone), (alone, plain)
            numbers = [max(modular.differences(*pair)) for pair in pairs]
            found[f"{label}, {way}"] = [*numbers, sorted(guider._warned)]
    return found
