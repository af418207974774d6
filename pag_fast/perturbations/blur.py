"""Gaussian blur over the image: of queries, or of every query's map of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ops.backend import is_unwatched
from .base import AttentionPerturbation, Layer, Rows, store_number, token_grid

# as SEG's own code has it
_INFINITE = 9999.0


@dataclass(frozen=True)
class BlurredQueries(AttentionPerturbation):
    """``O' = softmax(G(Q)·Kᵀ)·V``: queries are blurred over the image.

    Smoothed Energy Guidance (SEG), Hong, arXiv 2408.00760. G is a separable Gaussian of
    ``⌈6σ⌉`` taps (one more if that is even), at most the width of the token grid, with
    reflected borders. σ = ∞ (SEG's code: above 9999) makes every query the mean: then all rows of
    the map are equal, one query per head is enough, and attention takes O(N). As a mean and a
    linear layer may change places, ``mean(x·W) = mean(x)·W``, that query is projected from one
    token where neither norm nor rotary embedding lies between.

    What is blurred are the queries that meet the keys, behind norms and rotary embedding, where a
    layer has them. Queries of text tokens are not.

    Args:
        sigma: standard deviation in tokens.

    Raises:
        ValueError: σ is not a positive number.
    """

    sigma: float = math.inf

    name: ClassVar[str] = "blur"
    formula: ClassVar[str] = "O' = softmax(G_σ(Q)·Kᵀ)·V"
    source: ClassVar[str] = "SEG, arXiv 2408.00760"
    cost: ClassVar[str] = "σ = ∞: O(N) instead of O(N²), one query; else scores of one more branch"

    def __post_init__(self) -> None:
        store_number(self, "sigma", least=1e-3, infinite=True)

    @property
    def is_mean(self) -> bool:
        """Whether the blur is so wide that every query is the mean."""
        return self.sigma > _INFINITE

    def check(self, layer: Layer) -> None:
        if not self.is_mean:
            _check_image(self, layer)

    def means_query(self, attn: Any) -> bool:
        return self.is_mean and getattr(attn, "norm_q", None) is None

    def attend(self, rows: Rows) -> torch.Tensor:
        if self.is_mean and rows.mean_query is None and not rows.layer.linear:
            return rows.fused("blur")

        def image(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            if rows.mean_query is not None:
                # every query sees the same: one row of the mask is all of it
                mask = None if mask is None else mask[..., :1, :]
                return rows.attend(rows.mean_query, k, v, mask).expand_as(v)
            query = q[:, : rows.num_image]
            if self.is_mean:
                return rows.attend(query.mean(1, keepdim=True).expand_as(query), k, v)
            return rows.attend(gaussian_blur(query, self.sigma, rows.layer), k, v, mask)

        return rows.compose(image)


@dataclass(frozen=True)
class BlurredMap(AttentionPerturbation):
    """``O' = (A·Gᵀ)·V``: every query's map of attention is blurred over the image of the keys.

    The alternative to the identity that blurs the map, as in the comparison of PAG's authors (arXiv
    2403.17377). The blurred map never exists: as the blur is linear, ``(A·Gᵀ)·V = A·(Gᵀ·V)``, and
    attention runs on values that the adjoint of the blur has been applied to. So any attention
    kernel will do, and the blur itself is O(N). G is that of :class:`BlurredQueries`; with its
    reflected borders the blurred weights of a query need not add up to one, as in a blur of the map
    itself. Weights of text keys and maps of text queries stay as they are.

    Args:
        sigma: standard deviation in tokens.

    Raises:
        ValueError: σ is not a positive, finite number.
    """

    sigma: float = 1.0

    name: ClassVar[str] = "blur_map"
    formula: ClassVar[str] = "O' = (A·G_σᵀ)·V = A·(G_σᵀ·V)"
    source: ClassVar[str] = "PAG's comparison of perturbations, arXiv 2403.17377"
    cost: ClassVar[str] = "scores of one more branch"

    def __post_init__(self) -> None:
        store_number(self, "sigma", least=1e-3, most=_INFINITE)

    def check(self, layer: Layer) -> None:
        _check_image(self, layer)

    def attend(self, rows: Rows) -> torch.Tensor:
        def image(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            n = rows.num_image
            blurred = gaussian_blur(v[:, :n], self.sigma, rows.layer, adjoint=True)
            if rows.num_context:
                blurred = torch.cat([blurred, v[:, n:]], dim=1)
            return rows.attend(q[:, :n], k, blurred, mask)

        return rows.compose(image)


def gaussian_blur(
    x: torch.Tensor, sigma: float, layer: Layer, *, adjoint: bool = False
) -> torch.Tensor:
    """``[rows, N, H, D]`` blurred over the image that the N tokens are.

    The blur of SEG's code (taps, borders). Separable, and one matrix product per axis: the matrices
    hold the reflected borders, and their transposes are the adjoint.
    """
    if layer.state.size is None:
        raise ValueError(
            f"{layer.name} sees packed latents or a video as one sequence: a blur over an image "
            "cannot tell where a token is. BlurredQueries() without a sigma needs not."
        )
    height, width = token_grid(x.shape[1], layer.state.size)
    taps = math.ceil(6 * sigma)
    taps = min(taps + 1 - taps % 2, _odd(width))
    # SEG's code cannot reflect more than there is
    down = taps if taps // 2 < height else _odd(height)
    rows, channels = x.shape[0], x.shape[2] * x.shape[3]
    first, second = (_blur_matrix(n, t, sigma, x) for n, t in ((height, down), (width, taps)))
    if adjoint:
        first, second = first.T, second.T
    out = first @ x.reshape(rows, height, width * channels)
    out = second @ out.view(rows * height, width, channels)
    return out.view(x.shape)


def _odd(size: int) -> int:
    """The most taps that SEG's code allows."""
    return size - (size % 2 - 1) if size > 1 else 1


_MATRICES: dict[tuple[Any, ...], torch.Tensor] = {}


def _blur_matrix(size: int, taps: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """``[size, size]``: row i holds the weights of the tokens that token i is blurred from."""
    key = size, taps, sigma, like.device, like.dtype
    # inside a compiled graph it is a few pointwise steps; fakes must not be kept
    keeps = is_unwatched(like)
    if keeps and key in _MATRICES:
        return _MATRICES[key]
    half = taps // 2
    total = sum(math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-half, half + 1))
    wide = torch.promote_types(like.dtype, torch.float32)
    at = torch.arange(size, device=like.device, dtype=wide)
    i, j = at[:, None], at

    def weight(offset: torch.Tensor) -> torch.Tensor:
        inside = offset.abs() <= half
        return torch.where(inside, torch.exp(-0.5 * (offset / sigma) ** 2) / total, 0.0)

    # token j is seen directly, reflected at the first token, and reflected at the last
    matrix = weight(j - i)
    matrix = matrix + torch.where(j > 0, weight(-j - i), 0.0)
    matrix = matrix + torch.where(j < size - 1, weight(2 * (size - 1) - j - i), 0.0)
    matrix = matrix.to(like.dtype)
    if keeps and not matrix.is_inference():
        _MATRICES[key] = matrix
    return matrix


def _check_image(perturbation: AttentionPerturbation, layer: Layer) -> None:
    if layer.temporal:
        raise ValueError(
            f"{type(perturbation).__name__} blurs over an image, and the tokens of {layer.name} "
            "are frames: choose layers that are not motion modules."
        )
