"""Which rows of an attention's input attend, and what its output has to be extended to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..ops.autocast import autocast_dtype, lowered, without_autocast
from ..perturbations import AttentionPerturbation, Identity, Layer, Rows
from ..sharing.rows import SPLIT, BranchState
from ..sharing.threads import HERE

_IDENTITY = Identity()


class PerturbedProcessor:
    """What all processors share: the branch state, the level of their input, the backend.

    Args:
        state: what the model runs at the moment; without one (diffusers builds processors with no
            arguments while it loads adapters) every row attends.
        level: level at which the input arrives: SPLIT, or a lower one at the fork.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        branches: what happens here to each perturbed branch; ``None``: it attends.
        layer: the layer that carries this processor.
    """

    #: its attention has no softmax
    linear: ClassVar[bool] = False

    def __init__(
        self,
        state: BranchState | None = None,
        level: int = SPLIT,
        backend: str = "auto",
        branches: Sequence[AttentionPerturbation | None] = (_IDENTITY,),
        layer: Layer | None = None,
    ) -> None:
        self.state = state
        self.level = level
        self.backend = backend
        self.branches = tuple(branches)
        self.layer = Layer(linear=self.linear) if layer is None else layer
        constants = [None if b is None else b.constant(self.layer) for b in self.branches]
        self.constants = [None if c is None else torch.tensor(c) for c in constants]
        scored = [i for i, b in enumerate(self.branches, 1) if b is None or b.needs_scores]
        self._scored = max(scored, default=0)
        # the attention's own, for whoever finds this one left behind
        self.displaced: Any = None

    def takes_place_of(self, stock: Any) -> None:
        """Note what the layer has when this is not on it."""
        self.displaced = stock

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of a model that is made in the middle of our forward has its own processors."""
        return (
            (_unchanged, (self.displaced,)) if self.displaced else super().__reduce_ex__(protocol)
        )

    def place(self, device: torch.device) -> None:
        """Have the perturbations' numbers on the device that the layer runs on."""
        for index, constant in enumerate(self.constants):
            if constant is not None and constant.device != device:
                self.constants[index] = constant.to(device)

    def rows(self, total: int) -> tuple[int, int]:
        """``(num_attend, num_forked)`` for an input of ``total`` rows.

        ``num_forked`` is how many rows each perturbed branch has that begins here.
        """
        state = self.state
        slabs = None if state is None else state.slabs
        if state is None or slabs is None:
            return total, 0
        if not torch.compiler.is_dynamo_compiling():
            # somebody else's: his rows all attend
            if state.thread is not HERE.me and state.thread is not None:
                return total, 0
            state.entered += 1
        have, full = slabs[self.level], slabs[SPLIT]
        unit = total // have
        return (total - len(self.branches) * unit, 0) if have == full else (total, unit)

    def split(self, total: int, slabs: tuple[int, int, int]) -> tuple[int, int]:
        """As :meth:`rows`, where it is known that the rows are ours."""
        unit = total // slabs[self.level]
        if slabs[self.level] != slabs[SPLIT]:
            return total, unit
        return total - unit * len(self.branches), 0

    def scored(self, num_attend: int, total: int, num_context: int = 0) -> int:
        """How many rows of the input need queries and keys: identity rows without text do not."""
        if num_context:
            return total
        return num_attend + self._scored * (total - num_attend) // len(self.branches)

    def same_input(self, attn: Any) -> int:
        """How many of the projections q, k and v, in this order, see the same rows."""
        if self._scored < len(self.branches):
            return 2
        first = self.branches[0]
        means = len(self.branches) == 1 and first is not None and first.means_query(attn)
        return 1 if means and self.level == SPLIT else 3

    def means_query(self, attn: Any, num_attend: int, total: int, rotary: Any) -> bool:
        """Whether the perturbed rows need no queries but the projected mean of their input."""
        return (
            num_attend < total
            and len(self.branches) == 1
            and rotary is None
            and self.branches[0] is not None
            and self.branches[0].means_query(attn)
        )

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        num_attend: int,
        num_forked: int,
        num_context: int = 0,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        mean_query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention on all rows ``[rows, N, H, D]`` of the layer, perturbed where they are to be.

        ``query`` and ``key`` have the rows that :meth:`scored` says; ``value`` may be overwritten.
        """
        device = value.device.type
        lowers = autocast_dtype(device) is not None
        if lowers:
            # norms return fp32: autocast would bring all to one dtype for fused attention
            query, key, value, attn_mask, mean_query = lowered(  # type: ignore[assignment]
                query, key, value, attn_mask, mean_query
            )
        rows = Rows(
            query,
            key,
            value,
            num_attend,
            num_forked,
            num_context,
            attn_mask,
            scale,
            self.backend,
            self.layer,
            mean_query=mean_query,
        )
        if not lowers:
            return self._attention(rows)
        with without_autocast(device):
            return self._attention(rows)

    def _attention(self, rows: Rows) -> torch.Tensor:
        value, num_attend, num_forked = rows.value, rows.num_attend, rows.num_forked
        state = self.state
        if state is not None and state.ranks is not None and not rows.is_whole:
            return self._over_ranks(state.ranks, rows)
        if num_attend == value.shape[0] and not num_forked:
            return _IDENTITY.attend(rows)
        if len(self.branches) == 1:
            return self._perturbed(0, rows)
        return self._forked(rows) if num_forked else self._several(rows)

    def _over_ranks(self, ranks: Any, rows: Rows) -> torch.Tensor:
        """Tokens lie on several ranks: all of them for some of the heads, and back."""
        text, a = bool(rows.num_context), rows.num_attend
        perturbed = rows.num_forked or a < rows.value.shape[0]
        if text or self._scored or not perturbed:
            return ranks.to_tokens(self._attention(ranks.to_heads(rows)), text=text)
        # a value that takes the place of the output is where it is needed
        own = rows.value[rows.source]
        parts = [own] * (len(self.branches) if rows.num_forked else 1)
        if a:
            attending = rows.some(slice(a))
            attending.num_forked = 0
            parts.insert(0, ranks.to_tokens(self._attention(ranks.to_heads(attending)), text=False))
        return torch.cat(parts)

    def _perturbed(self, index: int, rows: Rows) -> torch.Tensor:
        perturbation = self.branches[index]
        assert perturbation is not None
        if self.constants[index] is not None:
            self.place(rows.value.device)
            rows.constant = self.constants[index]
            heads = rows.value.shape[2]
            assert rows.constant is not None
            if rows.constant.shape[0] != heads:  # ranks share them
                first = rows.layer.state.head_rank * heads
                rows.constant = rows.constant[first : first + heads]
        return perturbation.attend(rows)

    def _several(self, rows: Rows) -> torch.Tensor:
        """Several branches: the first perturbed one together with the rows that attend."""
        unit = (rows.value.shape[0] - rows.num_attend) // len(self.branches)
        parts: list[torch.Tensor] = []
        start = 0
        for index, perturbation in enumerate(self.branches):
            stop = rows.num_attend + (index + 1) * unit
            if perturbation is None:
                continue
            some = rows.some(slice(start, stop))
            some.num_attend = stop - unit - start
            parts.append(self._perturbed(index, some))
            start = stop
        if start < rows.value.shape[0]:
            some = rows.some(slice(start, None))
            some.num_attend = some.value.shape[0]
            parts.append(_IDENTITY.attend(some))
        return torch.cat(parts)

    def _forked(self, rows: Rows) -> torch.Tensor:
        """Several branches that all begin here, from the last attending rows."""
        first = next(i for i, b in enumerate(self.branches) if b is not None)
        begun = self._perturbed(first, rows.some(slice(None)))
        parts = [begun[: rows.num_attend]]
        for index, perturbation in enumerate(self.branches):
            if index == first:
                parts.append(begun[rows.num_attend :])
            elif perturbation is None:
                parts.append(parts[0][rows.source])
            else:
                some = rows.some(slice(rows.num_attend - rows.num_forked, rows.num_attend))
                some.num_attend = some.num_forked = 0
                # what is written in place would be read by the branches that follow
                some.value = some.value.clone()
                if not (perturbation.needs_scores or rows.num_context):
                    some.query, some.key = some.query[:0], some.key[:0]
                parts.append(self._perturbed(index, some))
        return torch.cat(parts)

    def spread(self, out: torch.Tensor, num_forked: int) -> torch.Tensor:
        """Output rows of all branches, where uncond and cond attended as one slab."""
        if not num_forked:
            return out
        assert self.state is not None and self.state.slabs is not None
        missing = self.state.slabs[SPLIT] * num_forked - out.shape[0]
        return out if missing == 0 else torch.cat([out[:missing], out])


@functools.cache
def with_signature(cls: Any) -> Any:
    """``cls`` for eager mode: diffusers derives the signature of its call anew in every call.

    Not for compilers: Dynamo cannot read a stored signature where attention arguments are given.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__call__": call, "__doc__": cls.__doc__})


def _unchanged(value: Any) -> Any:
    return value


def heads_last(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection ``[rows, N, H·D]`` seen as ``[rows, N, H, D]``."""
    # not −1, which PyTorch cannot tell of no rows: a rank that perturbs alone has none that attend
    return x.view(*x.shape[:2], heads, x.shape[2] // heads)


def project_out(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """``[rows, N, H, D]`` through the output projection and its dropout."""
    # a slice would be copied by the product in any case, and its bias added by a launch of its own
    return attn.to_out[1](attn.to_out[0](x.flatten(2).contiguous()))
