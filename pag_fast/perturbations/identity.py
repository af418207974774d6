"""The map of attention is the identity, entirely or in part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..settings.checks import number
from .base import AttentionPerturbation, Layer, Rows

Strength = float | Sequence[float]


@dataclass(frozen=True)
class Identity(AttentionPerturbation):
    """``O = V``: every image token attends to itself alone.

    Perturbed-Attention Guidance (PAG), Ahn et al., arXiv 2403.17377. STG-A of Spatiotemporal Skip
    Guidance (arXiv 2411.18664) is the same in video models. With text tokens in the same attention
    an image query sees itself and the text (diffusers' ``PAGJointAttnProcessor2_0``). Perturbed
    rows without text need no queries, keys or scores.
    """

    name: ClassVar[str] = "identity"
    formula: ClassVar[str] = "O = V"
    source: ClassVar[str] = "PAG, arXiv 2403.17377"
    cost: ClassVar[str] = "no scores"
    needs_scores: ClassVar[bool] = False

    def attend(self, rows: Rows) -> torch.Tensor:
        """One op for all rows; in the values' memory where that can be."""
        if not rows.num_context and rows.query.shape[0] > rows.num_attend:
            rows.query, rows.key = rows.query[: rows.num_attend], rows.key[: rows.num_attend]
        if rows.layer.linear:
            if not rows.num_attend:
                return rows.value
            return ops.linear_attention(
                rows.query,
                rows.key,
                rows.value,
                num_attend=rows.num_attend,
                num_forked=rows.num_forked,
                backend=rows.backend,
            )
        if rows.num_forked:
            return rows.fused(self.name)
        return ops.perturbed_attention_(
            rows.query,
            rows.key,
            rows.value,
            num_attend=rows.num_attend,
            num_context=rows.num_context,
            attn_mask=rows.attn_mask,
            scale=rows.scale,
            backend=rows.backend,
        )


@dataclass(frozen=True)
class SoftIdentity(AttentionPerturbation):
    """``O' = (1 − λ)·O + λ·V``: the map is mixed with the identity.

    SoftPAG of HeadHunter, arXiv 2506.10978: 0 is attention as it is, 1 the identity. With one
    strength per head, single heads are perturbed. Text queries are not.

    Args:
        strength: λ from 0 to 1; or one for each head; or a dictionary from patterns (regular
            expressions searched in layer names, the first that matches counts) to either.

    Raises:
        ValueError: a strength outside 0 to 1, an empty sequence or dictionary, or a pattern that is
            none.
    """

    strength: Strength | Mapping[str, Strength] = 0.5

    name: ClassVar[str] = "soft"
    formula: ClassVar[str] = "O' = (1 − λ)·O + λ·V"
    source: ClassVar[str] = "SoftPAG, arXiv 2506.10978"
    cost: ClassVar[str] = "scores of one more branch; none at the fork"

    def __post_init__(self) -> None:
        if isinstance(self.strength, Mapping):
            if not self.strength:
                raise ValueError("strength is an empty dictionary: name at least one layer.")
            parts = {_pattern(name): _checked(value) for name, value in self.strength.items()}
            object.__setattr__(self, "strength", parts)
        else:
            object.__setattr__(self, "strength", _checked(self.strength))

    def check(self, layer: Layer) -> None:
        self.constant(layer)

    def constant(self, layer: Layer) -> tuple[float, ...]:
        """λ of every head of the layer, or of all where nobody knows how many it has.

        Raises:
            ValueError: no pattern matches the layer, or it has another number of heads.
        """
        strength = self.strength
        if isinstance(strength, Mapping):
            found = [value for name, value in strength.items() if re.search(name, layer.name)]
            if not found:
                raise ValueError(
                    f"strength has no entry for the perturbed layer {layer.name}: its patterns are "
                    f"{', '.join(map(repr, strength))}. '' matches every layer."
                )
            strength = found[0]
        if isinstance(strength, int | float):
            return (float(strength),) * (layer.heads or 1)
        if layer.heads and len(strength) != layer.heads:
            raise ValueError(
                f"strength holds {len(strength)} numbers, and {layer.name} has {layer.heads} "
                "heads: give one number per head, or a dictionary with an entry for each layer."
            )
        return tuple(strength)

    def attend(self, rows: Rows) -> torch.Tensor:
        strength = rows.constant
        assert strength is not None
        if not rows.layer.heads and strength.numel() == 1:
            strength = strength.expand(rows.value.shape[2])
        if not rows.layer.linear:
            return rows.fused("soft", strength)
        out = rows.attend(rows.query, rows.key, rows.value)
        weight = strength.to(out.dtype)[:, None]
        mixed = torch.lerp(out[rows.source], rows.value[rows.source], weight)
        return torch.cat([out[: rows.num_attend], mixed])


def _pattern(name: str) -> str:
    try:
        re.compile(name)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"strength has {name!r} for a layer, which is not a regular expression: {error}."
        ) from error
    return name


def _checked(strength: Strength) -> Strength:
    if isinstance(strength, Sequence) and not isinstance(strength, str):
        if not strength:
            raise ValueError("strength is an empty sequence: give one number for each head.")
        return tuple(number("strength of a head", x, least=0.0, most=1.0) for x in strength)
    return number("strength", strength, least=0.0, most=1.0)
