"""Projections that diffusers has fused, against the layers that they were made of.

Fused attentions run ``to_qkv``, a copy of the weights of ``to_q``, ``to_k`` and ``to_v``, and
perturbed ones of ours the three layers. What has happened to either since (a LoRA that was loaded,
weights that were written) is in one of them alone. Diffusers' own PAG processors run the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def check_fused(attentions: Mapping[str, Any]) -> None:
    """Raises ValueError for attentions that run fused projections unlike their layers."""
    for name, attention in attentions.items():
        if not _runs_fused(attention):
            continue
        for fused, parts in _pairs(attention):
            if not _are_equal(fused, parts):
                raise ValueError(
                    f"{name} runs projections that were fused (fuse_qkv_projections) from layers "
                    "that are others now, as by a LoRA that was loaded since: its perturbed rows "
                    "would run those. Call unfuse_qkv_projections() first, and fuse again."
                )


def _runs_fused(attention: Any) -> bool:
    """Whether the attention's own processor runs what was fused."""
    if not getattr(attention, "fused_projections", False):
        return False
    # older attentions keep the flag, and have the processor say so
    kind = type(getattr(attention, "processor", None)).__name__
    return type(attention).__name__ != "Attention" or kind.startswith("Fused")


def _pairs(attention: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Each fused layer, and the layers that it was made of."""
    for name, names in _FUSED.items():
        fused, parts = getattr(attention, name, None), [getattr(attention, n, None) for n in names]
        if fused is not None and all(part is not None for part in parts):
            yield fused, parts


def _are_equal(fused: Any, parts: Iterable[Any]) -> bool:
    """Whether a fused layer computes what its parts do."""
    layers = [_plain(layer) for layer in (fused, *parts)]
    if any(layer is None for layer in layers):
        return False
    whole, *each = layers
    for name in ("weight", "bias"):
        values = [getattr(layer, name) for layer in each]
        if all(value is None for value in values) and getattr(whole, name) is None:
            continue
        if any(value is None for value in values) or getattr(whole, name) is None:
            return False
        sizes = [value.shape[0] for value in values]
        if sum(sizes) != getattr(whole, name).shape[0]:
            return False
        slices = getattr(whole, name).detach().split(sizes)
        if not all(map(_same, slices, values)):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _plain(layer: Any) -> Any:
    """The layer whose weight is all there is; ``None``: an adapter adds to it."""
    base = getattr(layer, "base_layer", None)
    if base is None:
        return layer
    idle = getattr(layer, "disable_adapters", False) or not getattr(layer, "active_adapters", ())
    return base if idle or getattr(layer, "merged", False) else None
