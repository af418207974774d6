"""The self-attention whose map Self-Attention Guidance looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..processors.self_attention import PerturbedSelfAttention


class QueriesAndKeys:
    """Stands for the attention map ``[rows · heads, N, N]`` that the pipeline would store.

    The pipeline takes the part of uncond with ``chunk`` and hands it to ``sag_masking``: nothing
    else is computed, and nothing where the scale is 0.

    Args:
        query, key: ``[rows, N, H, D]``.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.query = query
        self.key = key

    def chunk(self, chunks: int) -> Sequence[QueriesAndKeys]:
        """The maps of each of ``chunks`` equal parts of the batch."""
        pairs = zip(self.query.chunk(chunks), self.key.chunk(chunks), strict=True)
        return [QueriesAndKeys(query, key) for query, key in pairs]

    def received(self, backend: str) -> torch.Tensor:
        """Attention that every token receives, ``[rows, N]``."""
        return ops.received_attention(self.query, self.key, backend=backend)


class RememberingSelfAttention(PerturbedSelfAttention):
    """Plain fused attention that keeps its queries and keys until they are taken.

    Replaces diffusers' ``CrossAttnStoreProcessor``, which computes and stores the map in every
    pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: QueriesAndKeys | None = None

    def take(self) -> QueriesAndKeys | None:
        """What the latest pass has seen; it is kept no longer."""
        seen, self._seen = self._seen, None
        return seen

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Every row attends."""
        self._seen = QueriesAndKeys(query, key)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
        return out.transpose(1, 2)


def received_from_map(attention_map: torch.Tensor, rows: int) -> torch.Tensor:
    """Attention that every token receives, from a map ``[rows · heads, N, N]``: ``[rows, N]``.

    The number of heads is the map's own. The pipeline reads it from the UNet's configuration, where
    ``attention_head_dim`` may be something else.
    """
    maps = attention_map.unflatten(0, (rows, -1))
    return maps.sum(2, dtype=torch.promote_types(maps.dtype, torch.float32)).mean(1)
