"""Guiders of modular pipelines on every rank: the model on one process, then on all."""

from __future__ import annotations

from typing import Any

import modular
import torch
from context_cases import WAYS, prepare
from diffusers import ContextParallelConfig
from diffusers.hooks import LayerSkipConfig
from numerics import relative

from pag_fast.guiders import PerturbedAttentionGuidance, SkipLayerGuidance

STACK = {"wan": "blocks"}


def guiders(name: str) -> dict[str, Any]:
    """Attention perturbed in the middle and from the first layer on; blocks and parts skipped."""
    stack = STACK.get(name, "transformer_blocks")
    pag, skip = modular.ALWAYS, modular.SLG_ALWAYS

    def skipping(**parts: Any) -> SkipLayerGuidance:
        return SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0, 1], stack, **parts), **skip)

    return {
        "attention": PerturbedAttentionGuidance(**pag),
        "all attention": PerturbedAttentionGuidance(perturbed_guidance_layers=["attn"], **pag)
        if name != "wan"
        else PerturbedAttentionGuidance(perturbed_guidance_layers=["attn1"], **pag),
        "blocks": skipping(),
        "one block": SkipLayerGuidance(skip_layer_guidance_layers=1, **skip),
        "parts": skipping(skip_attention=True, skip_ff=False),
        "scores": skipping(skip_attention=False, skip_ff=True, skip_attention_scores=True),
    }


def _even(case: modular.Case) -> modular.Case:
    """Six tokens of text, which two ranks can share."""
    for name, (cond, uncond) in case.pairs.items():
        if name.startswith("encoder"):
            last = [x[:, -1:] for x in (cond, uncond)]
            case.pairs[name] = tuple(torch.cat(pair, 1) for pair in zip((cond, uncond), last))  # type: ignore[assignment]
    if "txt_ids" in case.fixed:
        case.fixed["txt_ids"] = torch.zeros(6, 3)
    return case


def exact(name: str) -> dict[str, Any]:
    """``[difference between one process and two, difference that the guider makes, what it says]``."""
    prepare()
    found = {}
    for label, guider in guiders(name).items():
        case = _even(modular.new_case(name))
        alone = modular.denoise(case, guider)
        off = guiders(name)[label]
        off.skip_layer_guidance_scale = 0.0
        plain = modular.denoise(case, off)
        ways = WAYS if label == "attention" and name != "qwen" else ("ulysses", "uneven ulysses")
        for way in ways:
            case = _even(modular.new_case(name))
            case.model.enable_parallelism(config=ContextParallelConfig(**WAYS[way]))
            again = guiders(name)[label]
            result = modular.denoise(case, again)
            pairs = [(result, alone), (alone, plain)]
            found[f"{label}, {way}"] = [max(modular.differences(*pair)) for pair in pairs]
            found[f"{label}, {way}"].append(sorted(again._warned))
    return found
