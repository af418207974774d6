"""Layer names: what a user writes, turned into attention modules of a denoiser.

Accepted, tried in this order:

* diffusers' names: regular expressions searched in module names. Unanchored, and ``.`` matches any
  character, so ``"blocks.1"`` also matches blocks 10 to 19: that is what a stock pipeline runs, and
  its defaults rely on it. ``exact=True`` demands that a match ends where a name component ends.
* the short names of diffusers' documentation that match nothing there: ``"down.block_2"``,
  ``"up.block_1.attentions_0"``.
* integers: a transformer block, by index.
* ComfyUI's grammar (sd-perturbed-attention): ``"m0"``, ``"u0.4"``, ``"d2.2-9"``, joined by commas.
  Blocks are numbered over the attention-bearing layers of the down, mid and up path; the number
  behind the dot is the transformer block in it.
"""

from __future__ import annotations

import re

from torch import nn

from ..settings.layers import Layers, as_list
from ..sharing.layout import attention_names
from .registry import find

_SHORT_NAME = re.compile(
    r"(down|up|mid)\.block(?:_?(\d+))?(?:\.(attentions|motion_modules)_(\d+))?"
)
_COMFY_ITEM = re.compile(r"([dmu])(\d+)(?:-(\d+))?(?:\.(\d+)(?:-(\d+))?)?")


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that PAG can perturb, by name: attentions over image tokens."""
    from diffusers.models.attention_processor import Attention

    found = find(model)
    if found is not None and found.is_derived:
        return {name: model.get_submodule(name) for name in found.attentions}
    if found is not None and found.layout is not None:
        names = attention_names(model, found.layout)
        return {name: model.get_submodule(name) for name in names}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    }


def transformer_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that hold self-attentions, in the order of ``named_modules``."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in self_attentions(model)))


def resolve(model: nn.Module, layers: Layers, *, exact: bool = False) -> dict[str, nn.Module]:
    """The attention modules that ``layers`` names, by module name.

    Raises:
        ValueError: an item that matches nothing; the message lists what could be meant.
    """
    candidates = self_attentions(model)
    chosen: dict[str, nn.Module] = {}
    for item in as_list(layers):
        names = _match(item, list(candidates), exact)
        if not names:
            raise ValueError(_no_match(item, list(candidates), type(model).__name__))
        chosen.update({name: candidates[name] for name in names})
    return {name: module for name, module in candidates.items() if name in chosen}


def _match(item: str | int, names: list[str], exact: bool) -> list[str]:
    if isinstance(item, int):
        return [
            name
            for name in names
            if re.match(rf"(transformer_blocks|blocks|layers)\.{item}\.", name)
        ]
    return (
        _match_regex(item, names, exact) or _match_short(item, names) or _match_comfy(item, names)
    )


def _match_regex(item: str, names: list[str], exact: bool) -> list[str]:
    try:
        pattern = re.compile(item)
    except re.error as error:
        raise ValueError(f"Layer {item!r} is not a valid regular expression: {error}.") from error
    if not exact:
        # diffusers' own rule: the 1 of "up_blocks.1" is not that of "up_blocks.1.attentions.1"
        number = item.rpartition(".")[2]
        fake = f".{number}" if number.isnumeric() else None
        return [
            name
            for name in names
            if pattern.search(name) and (fake is None or name == item or not name.endswith(fake))
        ]
    found = []
    for name in names:
        ends = {match.end() for match in pattern.finditer(name)}
        if ends & {i for i in range(len(name) + 1) if i == len(name) or name[i] in "._"}:
            found.append(name)
    return found


def _match_short(item: str, names: list[str]) -> list[str]:
    match = _SHORT_NAME.fullmatch(item)
    if match is None:
        return []
    path, index, kind, number = match.groups()
    prefix = "mid_block" if path == "mid" else f"{path}_blocks"
    if index is not None and path != "mid":
        prefix += f".{index}"
    if kind is not None:
        prefix += f".{kind}.{number}"
    return [name for name in names if name.startswith(f"{prefix}.")]


def _match_comfy(item: str, names: list[str]) -> list[str]:
    """ComfyUI's grammar over spatial ``attn1`` layers; ranges include both ends."""
    found: list[str] = []
    for part in item.replace(" ", "").split(","):
        match = _COMFY_ITEM.fullmatch(part)
        if match is None:
            return []
        path, first, last, block_first, block_last = match.groups()
        transformers = _attention_layers(names, path)
        blocks = range(int(first), int(last or first) + 1)
        inner = (
            None
            if block_first is None
            else range(int(block_first), int(block_last or block_first) + 1)
        )
        matched = []
        for index, transformer in enumerate(transformers):
            if index not in blocks:
                continue
            for name in names:
                tail = re.fullmatch(
                    rf"{re.escape(transformer)}\.transformer_blocks\.(\d+)\.attn1", name
                )
                if tail and (inner is None or int(tail[1]) in inner):
                    matched.append(name)
        if not matched:
            return []
        found += matched
    return found


def _attention_layers(names: list[str], path: str) -> list[str]:
    prefix = {"d": r"down_blocks\.\d+", "m": "mid_block", "u": r"up_blocks\.\d+"}[path]
    found = []
    for name in names:
        match = re.match(rf"({prefix}\.attentions\.\d+)\.transformer_blocks\.", name)
        if match and match[1] not in found:
            found.append(match[1])
    return found


def _no_match(item: str | int, names: list[str], model: str) -> str:
    if not names:
        return (
            f"Layer {item!r} matches nothing: {model} has no self-attention that can be perturbed."
        )
    return (
        f"Layer {item!r} matches none of the {len(names)} self-attention layers of {model}. "
        f"Its layers are: {_examples(names)}. A part of such a name works, 'mid' for a UNet or "
        "'blocks.13' for a transformer, or a regular expression."
    )


def no_default(model: nn.Module, pipeline: str) -> str:
    """What to say where nobody has chosen layers, neither a user nor a description."""
    return (
        f"No layers are known to be good for PAG in {pipeline}: name some, from those of "
        f"{type(model).__name__}: {_examples(list(self_attentions(model)))}."
    )


def _examples(names: list[str]) -> str:
    shown = [re.sub(r"\.(attn1|attn2|attn)$", "", name) for name in names]
    unique = list(dict.fromkeys(shown))
    return ", ".join(unique[:4] + (["…"] if len(unique) > 8 else []) + unique[4:][-4:])
