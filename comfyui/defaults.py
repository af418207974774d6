"""The blocks of transformers that are perturbed where the user names none, and who says so."""

from __future__ import annotations

from typing import Any

from .blocks import Block, dit_lists

# class of the denoiser: (kind, depth the block was published for, block, source)
PUBLISHED: dict[str, tuple[str, int, int, str]] = {
    "OpenAISignatureMMDITWrapper": ("double", 24, 13, "diffusers #8861"),
    "WanModel": ("double", 40, 8, "STG, arXiv 2411.18664"),
    "LTXVModel": ("double", 28, 19, "STG, arXiv 2411.18664"),
    "HunyuanVideo": ("double", 20, 2, "STG, arXiv 2411.18664"),
    "HunYuanDiT": ("double", 40, 14, "diffusers #8936"),
    "Flux": ("single", 38, 0, "ComfyUI-Fluxtapoz, PAGAttention"),
    "Chroma": ("single", 38, 0, "untested: that of Flux, which it was made of"),
    "QwenImageTransformer2DModel": ("double", 60, 40, "untested: two thirds of the way"),
}


def default_blocks(net: Any) -> frozenset[Block]:
    """One block: the published one, moved with the depth of ``net``; else two thirds of the way."""
    lists = dit_lists(net)
    kind, depth, number, _ = PUBLISHED.get(
        type(net).__name__, ("double" if "double" in lists else "single", 3, 2, "untested")
    )
    having = len(lists[kind])
    return frozenset({(kind, min(having - 1, number * having // depth), None)})
