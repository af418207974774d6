"""Names of blocks: how users write them, and which of them a model has."""

from __future__ import annotations

import re
from typing import Any

import torch

# (kind, block, transformer block of the block; None: all of them)
Block = tuple[str, int, int | None]

UNET_KINDS = {"d": "input", "m": "middle", "u": "output"}
DIT_LISTS = {
    "double": ("double_blocks", "joint_blocks", "transformer_blocks", "blocks", "layers"),
    "single": ("single_blocks",),
}

_SPAN = r"(\d+)(?:-(\d+))?"
_UNET_BLOCK = re.compile(rf"([dmu]){_SPAN}(?:\.{_SPAN})?")


def unet_blocks(net: Any) -> dict[tuple[str, int], int]:
    """Transformer blocks of each block of a UNet that has self-attention, in running order.

    Returns:
        their number, by ("input", "middle" or "output", block). ``middle`` is block 0.
    """
    from comfy.ldm.modules.attention import SpatialTransformer

    groups = [("input", net.input_blocks), ("output", net.output_blocks)]
    if net.middle_block is not None:
        groups.insert(1, ("middle", [net.middle_block]))
    found: dict[tuple[str, int], int] = {}
    for kind, blocks in groups:
        for number, block in enumerate(blocks):
            for layer in block:
                if isinstance(layer, SpatialTransformer):
                    attends = [one for one in layer.transformer_blocks if not one.disable_self_attn]
                    if len(attends) == len(layer.transformer_blocks):
                        found[kind, number] = len(attends)
    return found


def single_unet_block(net: Any, kind: str, number: int) -> frozenset[Block]:
    """The block that the two widgets name, as ComfyUI counts blocks.

    Raises:
        ValueError: the UNet has no self-attention there.
    """
    found = unet_blocks(net)
    if (kind, number) not in found:
        numbers = [str(n) for k, n in found if k == kind]
        what = f"{kind} blocks {', '.join(numbers)}" if numbers else f"no {kind} block at all"
        raise ValueError(
            f"unet_block_id {number} of {kind} has no self-attention that could be perturbed; "
            f"this model has it in {what}."
        )
    return frozenset({(kind, number, None)})


def parse_unet_blocks(net: Any, text: str) -> frozenset[Block]:
    """The blocks that a list such as ``m0, u0.4, d2.2-9`` names.

    ``d``, ``m``, ``u`` are the way down, the middle and the way up. The number counts blocks that
    have self-attention, from 0; behind a dot follow transformer blocks of it. Both may be spans.

    Raises:
        ValueError: a name that cannot be read, or a block that the model does not have.
    """
    found = unet_blocks(net)
    out: set[Block] = set()
    for name in (part.strip() for part in text.split(",")):
        match = _UNET_BLOCK.fullmatch(name.replace(" ", ""))
        if match is None:
            raise ValueError(
                f"unet_block_list: {name!r} is no block. Write d, m or u, a number or a span, and "
                "perhaps a dot and transformer blocks: m0, u0.4, d2.2-9."
            )
        letter, first, last, inner, inner_last = match.groups()
        kind = UNET_KINDS[letter]
        having = [number for k, number in found if k == kind]
        for index in _span(name, first, last):
            if index >= len(having):
                raise ValueError(
                    f"unet_block_list: {name!r} does not exist; this model has "
                    f"{_listed(letter, len(having))}."
                )
            number = having[index]
            if inner is None:
                out.add((kind, number, None))
                continue
            for transformer in _span(name, inner, inner_last):
                if transformer >= found[kind, number]:
                    raise ValueError(
                        f"unet_block_list: {name!r} does not exist; {letter}{index} has "
                        f"{_listed(f'{letter}{index}.', found[kind, number])}."
                    )
                out.add((kind, number, transformer))
    return frozenset(out)


def _span(name: str, first: str, last: str | None) -> range:
    if last is not None and int(last) < int(first):
        raise ValueError(
            f"{name!r} names no block: spans run upwards. Write {last}-{first}, not {first}-{last}."
        )
    return range(int(first), int(first if last is None else last) + 1)


def _listed(prefix: str, count: int) -> str:
    if count < 2:
        return f"{prefix}0 alone" if count else f"no {prefix} with self-attention"
    return f"{prefix}0 to {prefix}{count - 1}"


def replaced_keys(net: Any, blocks: frozenset[Block]) -> list[tuple[Any, ...]]:
    """The keys under which ComfyUI looks for a replacement of self-attention, for all ``blocks``.

    A key with a transformer block wins over one without: where another node has replaced
    ``(middle, 0, 0)``, a replacement under ``(middle, 0)`` would silently do nothing.
    """
    found = unet_blocks(net)
    keys: list[tuple[Any, ...]] = []
    for kind, number, inner in sorted(blocks, key=str):
        if inner is None:
            keys += [(kind, number), *((kind, number, i) for i in range(found[kind, number]))]
        else:
            keys.append((kind, number, inner))
    return keys


def dit_lists(net: Any) -> dict[str, list[torch.nn.Module]]:
    """The blocks of a transformer by kind, ``double`` and ``single``, in running order."""
    out: dict[str, list[torch.nn.Module]] = {}
    for kind, names in DIT_LISTS.items():
        for name in names:
            blocks = getattr(net, name, None)
            if isinstance(blocks, torch.nn.ModuleList) and len(blocks):
                out[kind] = list(blocks)
                break
    return out


def parse_dit_blocks(net: Any, double: str, single: str) -> frozenset[Block]:
    """The blocks of a transformer that two lists such as ``3, 7-9`` name.

    Raises:
        ValueError: a name that cannot be read, or a block that the model does not have.
    """
    lists = dit_lists(net)
    out: set[Block] = set()
    for kind, text in (("double", double), ("single", single)):
        having = len(lists.get(kind, ()))
        for name in (part.strip() for part in text.split(",") if part.strip()):
            match = re.fullmatch(_SPAN, name.replace(" ", ""))
            if match is None:
                raise ValueError(
                    f"{kind}_blocks: {name!r} is no block. Write numbers and spans: 3, 7-9."
                )
            for number in _span(name, *match.groups()):
                if number >= having:
                    raise ValueError(
                        f"{kind}_blocks: {name!r} does not exist; {type(net).__name__} has "
                        + (f"{kind} blocks 0 to {having - 1}." if having else f"no {kind} blocks.")
                    )
                out.add((kind, number, None))
    return frozenset(out)
