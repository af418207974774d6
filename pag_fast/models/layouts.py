"""Diffusion transformers: where their blocks are, and the self-attentions in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How a class of transformers is built.

    Attributes:
        blocks: attributes that hold blocks, in execution order.
        attentions: self-attentions of a block in execution order.
        merge: only the text, behind block 0's self-attention, sets uncond apart.
        before: in front of the blocks, modules or lists of them that take more than a block's
            share.
        equivariant: blocks treat an image token alike wherever it is.
    """

    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    merge: bool = False
    before: tuple[str, ...] = ()
    equivariant: bool = False


_JOINT = ("transformer_blocks", "single_transformer_blocks")

_LAYOUTS = {
    "SD3Transformer2DModel": Layout(("transformer_blocks",), ("attn", "attn2"), equivariant=True),
    "HunyuanDiT2DModel": Layout(("blocks",), ("attn1",)),
    "PixArtTransformer2DModel": Layout(
        ("transformer_blocks",), ("attn1",), merge=True, equivariant=True
    ),
    "SanaTransformer2DModel": Layout(("transformer_blocks",), ("attn1",), merge=True),
    "FluxTransformer2DModel": Layout(_JOINT, ("attn",)),
    "QwenImageTransformer2DModel": Layout(("transformer_blocks",), ("attn",)),
    "CogVideoXTransformer3DModel": Layout(("transformer_blocks",), ("attn1",)),
    "HunyuanVideoTransformer3DModel": Layout(_JOINT, ("attn",), before=("context_embedder",)),
    "WanTransformer3DModel": Layout(("blocks",), ("attn1",), merge=True),
    "LTXVideoTransformer3DModel": Layout(("transformer_blocks",), ("attn1",), merge=True),
    "Lumina2Transformer2DModel": Layout(
        ("layers",), ("attn",), before=("context_refiner", "noise_refiner")
    ),
}


def perturbable(model: Any) -> tuple[str, ...] | None:
    """Names of a transformer's attentions over image tokens, in the order it runs them.

    ``None`` for a class that is not known.
    """
    layout = layout_of(model)
    if layout is None:
        return None
    return tuple(
        f"{name}.{attn}"
        for name, block in walk(model, layout)
        for attn in layout.attentions
        if getattr(block, attn, None) is not None
    )


def layout_of(model: Any) -> Layout | None:
    """The layout of a model's class; ``None`` for one that is not known."""
    classes = (cls.__name__ for cls in type(model).__mro__)
    return next((_LAYOUTS[name] for name in classes if name in _LAYOUTS), None)


def walk(model: Any, layout: Layout) -> list[tuple[str, Any]]:
    """The blocks of a model by name, in execution order."""
    return [
        (f"{part}.{index}", block)
        for part in layout.blocks
        for index, block in enumerate(getattr(model, part))
    ]
