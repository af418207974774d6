"""Perturbations of whole transformer blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import BlockPerturbation, store_seed


@dataclass(frozen=True)
class SkippedBlock(BlockPerturbation):
    """``Block(x) → x``: the block's output is its input.

    Skip-Layer Guidance of Stable Diffusion 3.5 (Stability-AI/sd3.5, pull request 11; diffusers'
    ``skip_guidance_layers``), and STG-R of Spatiotemporal Skip Guidance (arXiv 2411.18664). In a
    block with two streams (SD3) both are left as they are; a HunyuanDiT block that takes a long
    skip leaves that out too. Layers name blocks by any of their attentions.
    """

    name: ClassVar[str] = "skip"
    formula: ClassVar[str] = "Block(x) → x"
    source: ClassVar[str] = "SLG, Stability-AI/sd3.5; STG-R, arXiv 2411.18664"
    cost: ClassVar[str] = "less than cond: the blocks run without the perturbed rows"
    fork: ClassVar[str] = "behind the first run of skipped blocks, which cond needs alone"
    skips: ClassVar[bool] = True


@dataclass(frozen=True)
class ShuffledTokens(BlockPerturbation):
    """``Block(x) → Block(P·x)``: image tokens enter the block in a random order, and stay in it.

    Token Perturbation Guidance (TPG), arXiv 2506.10036: one permutation P for all pictures, a new
    one for every block and step. A block without positions inside computes each token the same way
    wherever it is, so ``Block(P·x) = P·Block(x)``, exactly. In front of the fork the perturbed
    rows are those of cond. So from there to the end of the first perturbed ``Transformer2DModel``
    of a UNet they are an index permutation of cond's output, and cost nothing. In SD3 and PixArt,
    which add positions in front of the first block only, that reaches to the last block: there
    the perturbed prediction is cond's with its patches shuffled. HunyuanDiT (rotary embedding) and
    Sana (convolutions) have positions in every block.

    Args:
        seed: another seed is another order.

    Raises:
        ValueError: a seed that is no integer.
    """

    seed: int = 0

    name: ClassVar[str] = "shuffle"
    formula: ClassVar[str] = "Block(x) → Block(P·x)"
    source: ClassVar[str] = "TPG, arXiv 2506.10036"
    cost: ClassVar[str] = "an index permutation up to the end of the first perturbed transformer"
    fork: ClassVar[str] = (
        "at the end of the first perturbed transformer; where blocks have positions, in front of "
        "the first block"
    )
    random: ClassVar[bool] = True
    shuffles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        store_seed(self)

    def permutation(self, tokens: int, index: int, clock: torch.Tensor) -> torch.Tensor:
        """The order of ``tokens`` tokens in block ``index`` and step ``clock``, on its device.

        Tokens sorted by a hash of their position: the same on every device, without a generator,
        whose state no compiled graph could hold.
        """
        salt = _scrambled(self.seed ^ (index * 0x9E3779B97F4A7C15))
        start = _hash(clock.reshape(()) + salt)
        return _hash(torch.arange(tokens, device=clock.device) * _GOLDEN + start).argsort()


def _signed(x: int) -> int:
    """64 bits as the integer that int64 holds them as."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of int64; its products wrap around."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    # the sign must not move in
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scrambled(seed: int) -> int:
    return _signed(seed * 0xD1342543DE82EF95 + 1)
