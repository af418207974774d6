"""Denoisers that nobody has described, and whose forwards are not all alike."""

from __future__ import annotations

from typing import Any

import torch
from own_models import WIDTH, OwnDenoiser
from torch import nn


class Remembering(OwnDenoiser):
    """Keeps from forward to forward what ``keeps`` says."""

    # as its blocks: of two packages, one would be a stranger on the other's model
    __module__ = "own_models"
    keeps = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.count, self.table, self.past, self.last = 0, None, [], {}

    def through(self, tokens: torch.Tensor, temb: torch.Tensor, *rest: Any) -> torch.Tensor:
        keeps, mean = self.keeps, tokens.mean((0, 1))
        if keeps == "a count":
            self.count += 1
        elif keeps == "a list":
            self.past.append(tokens)
        elif keeps in ("a statistic", "a drift"):
            self.mean.mul_(0.9).add_(0.1 * mean)
        elif keeps == "a statistic by data":
            self.mean.data = 0.9 * self.mean + 0.1 * mean
        elif keeps == "a norm's statistics":
            self.norm.train()(tokens.flatten(0, 1))
        elif keeps == "a table":
            self.table = torch.ones(1) if self.table is None else self.table
            tokens = tokens * self.table
        elif keeps == "a residual" and "tokens" in self.last:
            return tokens + self.last["tokens"].mean()
        out = super().through(tokens, temb, *rest)
        if keeps == "a residual":
            self.last["tokens"] = out - tokens
        return out + self.mean if keeps == "a drift" else out


class Varying(OwnDenoiser):
    """Does what ``late`` says at timesteps from ``begins`` down to ``ends``."""

    __module__ = "own_models"
    late, begins, ends = "", 600.0, 0.0

    def through(
        self, tokens: torch.Tensor, temb: torch.Tensor, mask: Any, when: torch.Tensor
    ) -> torch.Tensor:
        late = self.late if self.ends <= float(when[0]) < self.begins else ""
        order = list(range(len(self.layers)))
        if late == "another order":
            order = [2, 1, 0, 3]
        elif late.startswith("without"):
            order.remove(int(late[-1]))
        elif late == "twice":
            order.insert(1, 0)
        elif late == "nothing":
            order = order[:1]
        for index in order:
            tokens = self.layers[index](tokens, temb, mask)
            if late == "mixed rows" and index == 2:
                tokens = tokens + 0.5 * tokens.mean(0, keepdim=True)
            if late == "rows by number" and index == 0:
                tokens = tokens * torch.linspace(1.0, 1.1, len(when))[:, None, None]
        return tokens
