"""Which rows of an attention's input attend, and what its output has to be extended to."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .. import ops
from ..branches.rows import SPLIT, BranchState


class PerturbedProcessor:
    """What all processors share: the branch state, the level of their input, the backend.

    Args:
        state: what the model runs at the moment; without one (diffusers builds processors with no
            arguments while it loads adapters) every row attends.
        level: level at which the input arrives: SPLIT, or a lower one at the fork.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
    """

    def __init__(
        self, state: BranchState | None = None, level: int = SPLIT, backend: str = "auto"
    ) -> None:
        self.state = state
        self.level = level
        self.backend = backend

    def rows(self, total: int) -> tuple[int, int]:
        """``(num_attend, num_forked)`` for an input of ``total`` rows."""
        slabs = None if self.state is None else self.state.slabs
        if slabs is None:
            return total, 0
        have, full = slabs[self.level], slabs[SPLIT]
        unit = total // have
        return (total - unit, 0) if have == full else (total, unit)

    def scored(self, num_attend: int, total: int, num_context: int = 0) -> int:
        """How many rows of the input need queries and keys: identity rows without text do not."""
        return total if num_context else num_attend

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
    ) -> torch.Tensor:
        """Attention on all rows ``[rows, N, H, D]`` of the layer, perturbed where they are to be.

        ``query`` and ``key`` have the rows that :meth:`scored` says; ``value`` may be overwritten.
        """
        run = ops.perturbed_attention_
        if num_forked:
            run = functools.partial(ops.perturbed_attention, num_forked=num_forked)
        return run(
            query,
            key,
            value,
            num_attend=num_attend,
            num_context=num_context,
            attn_mask=attn_mask,
            scale=scale,
            backend=self.backend,
        )

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
    own = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    call.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__call__": call, "__doc__": cls.__doc__})


def heads_last(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection ``[rows, N, H·D]`` seen as ``[rows, N, H, D]``."""
    return x.view(*x.shape[:2], heads, -1)


def project_out(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """``[rows, N, H, D]`` through the output projection and its dropout."""
    # a slice would be copied by the product in any case, and its bias added by a launch of its own
    return attn.to_out[1](attn.to_out[0](x.flatten(2).contiguous()))
