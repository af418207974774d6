"""How a diffusion transformer is built, as far as sharing has to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT, IMAGE, PADDING = "text", "image", "padding"
"""What the tokens of a stream are."""


@dataclass(frozen=True)
class Stream:
    """One of the sequences of tokens that a block takes and returns.

    Attributes:
        argument: the name of the block's argument that holds it.
        tokens: what it consists of, in order: :data:`TEXT`, :data:`IMAGE` and :data:`PADDING`.
    """

    argument: str
    tokens: tuple[str, ...]


Spread = Callable[[int, int, Mapping[str, Any]], list[int]]
"""Which of so many residuals goes behind each of so many blocks, given the model's arguments."""


def by_intervals(residuals: int, blocks: int, call: Mapping[str, Any]) -> list[int]:
    """Each goes behind as many blocks in a row, rounded up; XLabs' nets begin anew instead."""
    if call.get("controlnet_blocks_repeat"):
        return [index % residuals for index in range(blocks)]
    interval = -(-blocks // residuals)
    return [index // interval for index in range(blocks)]


def by_proportion(residuals: int, blocks: int, call: Mapping[str, Any]) -> list[int]:
    """Each goes behind a share of the blocks, in order."""
    interval = blocks / residuals
    return [int(index / interval) for index in range(blocks)]


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds between the blocks of a transformer.

    Attributes:
        argument: of the model, a list of tensors with rows in front.
        blocks: the attribute that holds the blocks behind which they go.
        first: index of the block behind which the first one goes.
        spread: of models that take any number of them; ``None``: each goes behind one block.
    """

    argument: str
    blocks: str
    first: int = 0
    spread: Spread | None = None


@dataclass(frozen=True)
class Layout:
    """How a class of transformers is built.

    Attributes:
        blocks: attributes that hold blocks, in execution order.
        attentions: self-attentions of a block in execution order.
        merge: only the text, behind block 0's self-attention, sets uncond apart.
        before: in front of the blocks, modules or lists of them that take more than a block's
            share.
        twice: arguments of a block that may hold every row twice, all of them once and then again.
        residuals: what a ControlNet adds between blocks.
        equivariant: blocks treat an image token alike wherever it is.
        whole_between: the model's own code between two blocks does something with rows that needs
            all of them: blocks that run on fewer hand on copies.
        inner: of what the lists hold, the attribute that is the block itself.
    """

    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    merge: bool = False
    before: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    residuals: tuple[Residuals, ...] = ()
    equivariant: bool = False
    whole_between: bool = False
    inner: str = ""


IMAGE_ALONE = (Stream("hidden_states", (IMAGE,)),)
TEXT_THEN_IMAGE = (
    Stream("encoder_hidden_states", (TEXT,)),
    Stream("hidden_states", (IMAGE,)),
)
IMAGE_THEN_TEXT = TEXT_THEN_IMAGE[::-1]
"""Streams in the order in which most classes of blocks return them."""


def walk(model: Any, layout: Layout) -> list[tuple[str, Any]]:
    """The blocks of a model by name, in execution order."""
    found = [
        (f"{part}.{index}", block)
        for part in layout.blocks
        for index, block in enumerate(model.get_submodule(part))
    ]
    if layout.inner:
        return [(f"{name}.{layout.inner}", getattr(x, layout.inner)) for name, x in found]
    return found


def attentions_of(block: Any, layout: Layout) -> list[tuple[str, Any]]:
    """The self-attentions that a block has, by attribute, in execution order."""
    found = [(name, getattr(block, name, None)) for name in layout.attentions]
    return [(name, module) for name, module in found if module is not None]


def attention_names(model: Any, layout: Layout) -> tuple[str, ...]:
    """Names of a transformer's attentions over image tokens, in the order it runs them."""
    return tuple(
        f"{name}.{attention}"
        for name, block in walk(model, layout)
        for attention, _ in attentions_of(block, layout)
    )


def argument_order(streams: Sequence[Stream]) -> tuple[str, ...]:
    """The arguments whose places a block's outputs take, in the order of the outputs."""
    return tuple(stream.argument for stream in streams)
