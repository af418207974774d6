"""Which tokens of an attention's sequence are the image's, where that was seen and not described.

What is seen is a mask over the keys of every row: prompts of different lengths may leave another
one in each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

Run = tuple[int, int, int]
"""Context in front of the image's tokens, these, and context behind them, in a row."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The sequence of one attention.

    Attributes:
        image: ``[1, keys]``, or ``[rows, keys]`` where rows differ, bool: the key is an image
            token. Everything else is context: text, padding, what a model adds.
        queries: how many queries there are; fewer than keys where keys are appended.
        context: how many keys are context, the same number in all rows; -1 where rows differ.
        order: ``[keys]``, the image's tokens first; ``None`` where they are first as it is, or
            where rows differ.
        back: undoes ``order``.
    """

    image: torch.Tensor
    queries: int
    context: int
    order: torch.Tensor | None = None
    back: torch.Tensor | None = None

    @classmethod
    def of(cls, image: torch.Tensor, queries: int) -> Tokens:
        """From a mask ``[rows, keys]`` on the model's device."""
        if bool((image == image[:1]).all()):
            image = image[:1].clone()
            context = int((~image[0]).sum())
            first = bool(image[0, : image.shape[1] - context].all())
            order = None if first else torch.argsort((~image[0]).int(), stable=True)
            back = None if order is None else torch.argsort(order)
            return cls(image, queries, context, order, back)
        return cls(image, queries, -1)

    @property
    def are_uniform(self) -> bool:
        """Whether queries are keys, and every row has its context in the same place."""
        return self.context >= 0 and self.queries == self.image.shape[1]

    def slab(self, index: int, slabs: int) -> Tokens:
        """The tokens of one branch of a batch of ``slabs`` branches."""
        if self.image.shape[0] == 1:
            return self
        return Tokens.of(self.image.chunk(slabs)[index], self.queries)

    def to(self, device: str | torch.device) -> Tokens:
        """The same on another device."""
        moved = [None if x is None else x.to(device) for x in (self.order, self.back)]
        return Tokens(self.image.to(device), self.queries, self.context, *moved)

    def densely(self) -> Tokens:
        """The same, for a mask over all pairs of tokens: slower, and nothing is put in order."""
        return replace(self, context=-1, order=None, back=None)

    def forbidden(self) -> torch.Tensor:
        """``[1 or rows, 1, queries, keys]``, bool: what a perturbed query must not see.

        An image query sees itself and the context; context queries see everything. Where keys are
        appended, the queries are the image's tokens in their order among the keys.
        """
        rows, keys = self.image.shape
        if self.queries == keys:
            queries, itself = self.image, torch.eye(keys, dtype=torch.bool)[None]
        else:
            place = self.image.int().cumsum(1) - 1
            queries = self.image.new_ones((rows, self.queries))
            itself = place[:, None, :] == torch.arange(self.queries, device=place.device)[:, None]
        itself = itself.to(self.image.device)
        return (queries[:, :, None] & self.image[:, None, :] & ~itself)[:, None]


@functools.lru_cache(maxsize=64)
def in_runs(runs: tuple[Run, ...], device: torch.device) -> Tokens:
    """The tokens of a sequence in which those of the image stand together.

    ``runs`` are of all rows, or one for each. Compiled graphs and recorded ones guard on what is
    returned, so that it is the same object every time.
    """
    rows = [[False] * before + [True] * image + [False] * behind for before, image, behind in runs]
    image = torch.tensor(rows, device="cpu")
    return Tokens.of(image, image.shape[1]).to(device)
