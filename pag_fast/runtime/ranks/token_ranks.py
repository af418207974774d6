"""Context parallelism: each rank has some tokens, and in a perturbed layer all for some heads.

Diffusers' ``enable_parallelism(config=ContextParallelConfig(...))`` cuts each sequence into one
part for each rank. A perturbed layer exchanges them as Ulysses does (DeepSpeed-Ulysses, arXiv
2309.14509), be it Ulysses or ring that the other layers run with: behind the exchange a rank has
the whole image and the whole text of its heads, and every perturbation is what it is in one
process.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from ...perturbations import Rows


class TokenRanks:
    """How the tokens of one forward lie on the ranks of a group.

    Args:
        config: the model's ``ContextParallelConfig``.
        image, text: how many tokens the sequences of all ranks have together.
    """

    def __init__(self, config: Any, image: int, text: int) -> None:
        self.group = config._flattened_mesh.get_group()
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.image, self.text = image, text
        self.images, self.texts = (_parts(n, self.world) for n in (image, text))

    @property
    def own_image(self) -> int:
        """How many of the image's tokens are here."""
        return self.images[self.rank]

    @property
    def own_text(self) -> int:
        """How many of the text's tokens are here."""
        return self.texts[self.rank]

    # ---- attention ----

    def to_heads(self, rows: Rows) -> Rows:
        """All tokens of this rank's heads: ``[rows, N, H, D]`` to ``[rows, N·ranks, H/ranks, D]``.

        Tokens are in the order of one process, the image's first.

        Raises:
            ValueError: a sequence of another length than the arguments of the model say, or a mask
                that tells queries or heads apart.
        """
        tokens = rows.value.shape[1]
        own = self.own_text if rows.num_context else 0
        if (tokens, rows.num_context) != (self.own_image + own, own):
            raise ValueError(
                f"{rows.layer.name} is given {tokens} tokens, of which {rows.num_context} are "
                f"text, where {self.own_image} of the image and {own} of the text were expected: "
                "pag_fast knows diffusers' own way to cut sequences, and no other cp_plan."
            )
        text = bool(rows.num_context)
        q, k, v = (self._to_heads(x, text) for x in (rows.query, rows.key, rows.value))
        return dataclasses.replace(
            rows,
            query=q,
            key=k,
            value=v,
            num_context=self.text if text else 0,
            attn_mask=None if rows.attn_mask is None else self._keys(rows, rows.attn_mask),
            is_whole=True,
        )

    def to_tokens(self, x: torch.Tensor, *, text: bool) -> torch.Tensor:
        """The opposite, for an attention's output."""
        sizes = self._sizes(text)
        if text:
            images, texts = x[:, : self.image], x[:, self.image :]
            pairs = zip(images.split(self.images, 1), texts.split(self.texts, 1), strict=True)
            x = torch.cat([part for pair in pairs for part in pair], dim=1)
        count, _, heads, dim = x.shape
        own = sizes[self.rank]
        # [tokens, rows, heads, dim]
        out = x.new_empty(self.world * own, count, heads, dim)
        sent = x.transpose(0, 1).contiguous()
        dist.all_to_all_single(out, sent, [own] * self.world, sizes, group=self.group)
        out = out.view(self.world, own, count, heads, dim).permute(2, 1, 0, 3, 4)
        return out.reshape(count, own, self.world * heads, dim)

    def _to_heads(self, x: torch.Tensor, text: bool) -> torch.Tensor:
        count, own, heads, dim = x.shape
        share, sizes = heads // self.world, self._sizes(text)
        if not count:  # rows that need no queries and keys
            return x.new_empty(0, sum(sizes), share, dim)
        # [ranks, tokens, rows, heads, dim]
        sent = x.view(count, own, self.world, share, dim).permute(2, 1, 0, 3, 4).contiguous()
        out = x.new_empty(sum(sizes), count, share, dim)
        dist.all_to_all_single(out, sent.flatten(0, 1), sizes, [own] * self.world, group=self.group)
        return self._image_first(out, 0, text).transpose(0, 1)

    def _sizes(self, text: bool) -> list[int]:
        """How many tokens each rank has."""
        return (
            [i + t for i, t in zip(self.images, self.texts, strict=True)] if text else self.images
        )

    def _image_first(self, x: torch.Tensor, dim: int, text: bool) -> torch.Tensor:
        """What came from all ranks, image and text by turns, with the image in front."""
        if not text:
            return x
        pairs = zip(self.images, self.texts, strict=True)
        parts = x.split([n for pair in pairs for n in pair], dim)
        return torch.cat([*parts[::2], *parts[1::2]], dim)

    def _keys(self, rows: Rows, mask: torch.Tensor) -> torch.Tensor:
        """A mask over the keys of this rank as one over all keys."""
        if mask.shape[-2] != 1 or mask.shape[1] != 1:
            raise ValueError(
                f"{rows.layer.name} has a mask of its own for queries or heads, which context "
                "parallelism has cut: run this pipeline without it."
            )
        text = bool(rows.num_context)
        found = self._gathered(mask.movedim(-1, 0), self._sizes(text))
        return self._image_first(found, 0, text).movedim(0, -1)

    # ---- blocks ----

    def whole(self, tokens: int, *, text: bool) -> bool:
        """Whether a block is given all tokens, which a hook of its own is going to cut."""
        return tokens == self.image + (self.text if text else 0)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Of all tokens ``[rows, N, channels]`` those of this rank."""
        return x.tensor_split(self.world, dim=1)[self.rank]

    def in_order(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """This rank's image tokens ``[rows, N, channels]`` of all ranks' in another order."""
        found = self._gathered(x.transpose(0, 1), self.images)
        own = order.tensor_split(self.world)[self.rank]
        return found.index_select(0, own).transpose(0, 1)

    def _gathered(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """What all ranks have, along the first dimension."""
        # not every backend gathers parts of several sizes
        most = max(sizes)
        sent = x.new_zeros(most, *x.shape[1:])
        sent[: x.shape[0]] = x
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _parts(tokens: int, ranks: int) -> list[int]:
    """How ``tensor_split`` cuts tokens."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]
