"""What a perturbation is: what a perturbed row gets in a layer, or a whole block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from .. import ops
from ..settings.checks import number, whole_number
from ..sharing.rows import BranchState


@dataclass(frozen=True)
class Layer:
    """One perturbed layer, as a perturbation sees it.

    Attributes:
        name: module name in its denoiser.
        index: another number for every perturbed layer of a model: random numbers start from it.
        heads: how many heads it has; 0 where only its product will tell.
        linear: its attention is linear, without a softmax (Sana).
        temporal: its tokens are the frames of a video, not an image.
        state: what the model runs, for the size of its latents and the number of the step.
    """

    name: str = ""
    index: int = 0
    heads: int = 0
    linear: bool = False
    temporal: bool = False
    state: BranchState = field(default_factory=BranchState)


@dataclass
class Rows:
    """Queries, keys and values of a layer, and which of their rows are perturbed.

    Attributes:
        query, key, value: ``[rows, N, H, D]``. ``query`` and ``key`` may lack the perturbed rows
            where the perturbation needs none there, and ``value`` may be overwritten.
        num_attend: rows ``< num_attend`` attend; those behind are perturbed.
        num_forked: perturbed rows to append that have the queries, keys and values of the last
            attending rows.
        num_context: how many of the N tokens, the last ones, are text; its queries are never
            perturbed.
        attn_mask: broadcastable to ``[rows of query, H, N, N]``.
        constant: what :meth:`AttentionPerturbation.constant` returned, on the layer's device.
        mean_query: ``[perturbed rows, 1, H, D]``, instead of queries of the perturbed rows.
        is_whole: tokens were spread over ranks, and heads are now.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    num_attend: int
    num_forked: int = 0
    num_context: int = 0
    attn_mask: torch.Tensor | None = None
    scale: float | None = None
    backend: str = "auto"
    layer: Layer = field(default_factory=Layer)
    constant: torch.Tensor | None = None
    mean_query: torch.Tensor | None = None
    is_whole: bool = False

    @property
    def source(self) -> slice:
        """The rows that the perturbed ones are made of."""
        if self.num_forked:
            return slice(self.num_attend - self.num_forked, self.num_attend)
        return slice(self.num_attend, None)

    @property
    def num_image(self) -> int:
        """How many tokens are not text."""
        return self.value.shape[1] - self.num_context

    def some(self, rows: slice) -> Rows:
        """These rows of all, with everything else as it is.

        Rows that have no queries and keys are the last.
        """
        # not dataclasses.replace, which torch 2.6 does not trace
        return Rows(
            self.query[rows],
            self.key[rows],
            self.value[rows],
            self.num_attend,
            self.num_forked,
            self.num_context,
            self.mask(rows),
            self.scale,
            self.backend,
            self.layer,
            self.constant,
            self.mean_query,
            self.is_whole,
        )

    def mask(self, rows: slice) -> torch.Tensor | None:
        """The mask of some rows."""
        mask = self.attn_mask
        return mask if mask is None or mask.shape[0] == 1 else mask[rows]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's own attention, unperturbed; ``[rows, M, H, D]`` for M queries."""
        if self.layer.linear:
            return ops.linear_attention(
                query, key, value, num_attend=query.shape[0], backend=self.backend
            )
        return ops.softmax_attention(query, key, value, attn_mask, self.scale)

    def fused(self, perturbation: str, strength: torch.Tensor | None = None) -> torch.Tensor:
        """All rows in one op, which knows ``perturbation`` itself."""
        return ops.perturbed_attention(
            self.query,
            self.key,
            self.value,
            num_attend=self.num_attend,
            num_context=self.num_context,
            num_forked=self.num_forked,
            attn_mask=self.attn_mask,
            scale=self.scale,
            perturbation=perturbation,
            strength=strength,
            backend=self.backend,
        )

    def compose(self, image: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Attention of the rows that attend, ``image`` for the image tokens of the others.

        Args:
            image: given query, key, value and mask of the perturbed rows, returns their output
                ``[rows, N − T, H, D]``. The query may be missing, see ``mean_query``.

        Returns:
            ``[rows + num_forked, N, H, D]``.
        """
        parts, rows = [], slice(0, self.num_attend)
        if self.num_attend:
            q, k, v = self.query[rows], self.key[rows], self.value[rows]
            parts.append(self.attend(q, k, v, self.mask(rows)))
        rows = self.source
        q, k, v, mask = self.query[rows], self.key[rows], self.value[rows], self.mask(rows)
        perturbed = image(q, k, v, mask)
        if self.num_context:
            # where q, k and v are those of cond, so is what a text query gets
            text = (
                parts[0][rows, self.num_image :]
                if self.num_forked
                else self.attend(q[:, self.num_image :], k, v, mask)
            )
            perturbed = torch.cat([perturbed, text], dim=1)
        return torch.cat([*parts, perturbed])


@dataclass(frozen=True)
class Perturbation:
    """What sets a perturbed branch apart from cond.

    Attributes:
        name: what :class:`pag_fast.PatchConfig` calls it.
        formula: what a perturbed row gets. O is the output of attention, V the values, x the input.
        source: the paper or code it comes from.
        cost: what it costs next to the identity, which is cheapest.
        fork: where the perturbed branch begins.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    fork: ClassVar[str] = "in the first layer, behind its projections"
    #: whole transformer blocks are perturbed, not attentions
    whole_blocks: ClassVar[bool] = False
    #: another draw in every step
    random: ClassVar[bool] = False

    def describe(self) -> str:
        """One line: settings, formula, source."""
        values = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]
        settings = f"({', '.join(values)})" if values else ""
        return f"{type(self).__name__}{settings}: {self.formula} ({self.source})"


@dataclass(frozen=True)
class AttentionPerturbation(Perturbation):
    """A perturbation of self-attention layers."""

    #: a layer whose perturbed image queries need neither queries nor keys
    needs_scores: ClassVar[bool] = True

    def check(self, layer: Layer) -> None:
        """Raise ValueError where this layer cannot be perturbed so."""

    def constant(self, layer: Layer) -> tuple[float, ...] | None:
        """Numbers of this layer to have on its device, if any."""
        return None

    def means_query(self, attn: Any) -> bool:
        """Whether the mean of the layer's input, projected, is all the query a row needs."""
        return False

    def attend(self, rows: Rows) -> torch.Tensor:
        """The output of attention ``[rows + num_forked, N, H, D]`` for all rows of a layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockPerturbation(Perturbation):
    """A perturbation of whole transformer blocks."""

    whole_blocks: ClassVar[bool] = True
    #: the block is left out
    skips: ClassVar[bool] = False
    #: the block's tokens get another order, see :meth:`permutation`
    shuffles: ClassVar[bool] = False

    def permutation(self, tokens: int, index: int, clock: torch.Tensor) -> torch.Tensor:
        """The order ``[tokens]`` in which tokens enter block ``index`` in step ``clock``."""
        raise NotImplementedError


def store_seed(settings: Perturbation) -> None:
    """Keep ``settings.seed`` as an int; ValueError unless a generator takes it."""
    try:
        seed = whole_number("seed", settings.seed, least=0, most=2**63 - 1)  # type: ignore[attr-defined]
    except ValueError:
        raise ValueError(
            f"seed must be an integer from 0 to 2**63 − 1; got {settings.seed!r}."  # type: ignore[attr-defined]
        ) from None
    object.__setattr__(settings, "seed", seed)


def store_number(settings: Any, name: str, **limits: Any) -> None:
    """Keep an option of a frozen object as a float; ValueError unless it is within ``limits``."""
    object.__setattr__(settings, name, number(name, getattr(settings, name), **limits))


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """``(rows, columns)`` of the image that ``tokens`` tokens are, of latents of ``size``.

    UNets halve latents, rounding up; transformers cut them into patches. Where neither gives this
    number of tokens, the grid has the latents' aspect ratio.

    Raises:
        ValueError: no grid of that ratio has so many tokens.
    """
    height, width = size
    rows, columns = height, width
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns == tokens:
        return rows, columns
    rows = max(1, round((tokens * height / width) ** 0.5))
    if tokens % rows == 0:
        return rows, tokens // rows
    raise ValueError(
        f"{tokens} tokens are no grid with the aspect ratio of latents of {height} × {width}: a "
        "blur needs to know where each token is. BlurredQueries() without a sigma does not."
    )
