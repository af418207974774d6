"""Perturbed transformer blocks: skipped, or entered with their tokens in another order.

Hooks that stand outside those of the branch plan: they see a block's input before the plan cuts it
to fewer rows, and append the perturbed rows where the block has run without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .layout import IMAGE, IMAGE_ALONE, TEXT, Stream, argument_order
from .plan import BranchPlan
from .rows import SPLIT, BranchState


class BlockAction(Protocol):
    """What happens to one perturbed branch in a block, see :mod:`pag_fast.perturbations`."""

    @property
    def skips(self) -> bool:
        """Whether the block is left out."""

    @property
    def shuffles(self) -> bool:
        """Whether the block's tokens get another order."""

    def permutation(self, tokens: int, index: int, clock: torch.Tensor) -> torch.Tensor:
        """The order ``[tokens]`` in which tokens enter block ``index`` in step ``clock``."""


Actions = Sequence[BlockAction | None]
"""What happens to each perturbed branch in one block."""


def skips(action: BlockAction | None) -> bool:
    """Whether the block is left out for a branch."""
    return action is not None and action.skips


def runs_without(actions: Actions | None) -> bool:
    """Whether no perturbed branch needs the block."""
    return actions is not None and all(map(skips, actions))


def begins_behind(actions: Actions, attends: bool) -> bool:
    """Whether perturbed branches that begin in a block need nothing of it but cond's rows.

    ``attends``: an attention inside is perturbed for some branch.
    """
    return not attends and all(action is None or skips(action) for action in actions)


def is_shuffled(actions: Actions) -> bool:
    """Whether there is one perturbed branch, and its tokens get another order."""
    return len(actions) == 1 and actions[0] is not None and actions[0].shuffles


class PerturbedBlock:
    """Pre-hook and hook of a block in which some branches are perturbed.

    Args:
        state: what the model runs.
        actions: what happens to each branch.
        index: number of the block, for random orders.
        arrives, runs: levels of the block's input and of the rows that it runs on.
        shuffled: ``(perturbation, index)`` of every block in a run that ends here and that the one
            perturbed branch leaves as a permutation of cond.
        streams: names of the arguments that a block hands on, in the order of its outputs.
        holds_text: text is in one sequence with the image; what is neither of the two is behind.
        image_first: the image is in front of the text there, and not behind it.
    """

    def __init__(
        self,
        state: BranchState,
        actions: Actions,
        *,
        index: int,
        arrives: int = SPLIT,
        runs: int = SPLIT,
        shuffled: Sequence[tuple[BlockAction, int]] = (),
        streams: Sequence[str] = ("hidden_states",),
        holds_text: bool = False,
        image_first: bool = False,
    ) -> None:
        self.state = state
        self.arrives = arrives
        self.runs = runs
        self.index = index
        self.shuffled = tuple(shuffled)
        self.streams = tuple(streams)
        self.holds_text = holds_text
        self.image_first = image_first
        self.branches = len(actions)
        self.skipped = tuple([i for i, action in enumerate(actions) if skips(action)])
        self.orders = tuple([(i, a) for i, a in enumerate(actions) if a is not None and a.shuffles])
        self._kept: list[list[torch.Tensor]] = []

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put tokens in order, and keep the input of branches that skip the block."""
        slabs = self.state.slabs
        if slabs is None:
            return None
        have, full = slabs[self.arrives], slabs[SPLIT]
        hidden = args[0] if args else kwargs["hidden_states"]
        unit = hidden.shape[0] // have
        if self.skipped:
            # HunyuanVideo passes its text by position, behind the image
            given = {"hidden_states": hidden, "encoder_hidden_states": args[1:2], **kwargs}
            # the one of a block that has one, whatever it calls it
            inputs = [hidden] if len(self.streams) == 1 else [given[x] for x in self.streams]
            inputs = [x[0] if isinstance(x, tuple) else x for x in inputs]
            self._kept = [
                [self._branch(x, i, unit, have == full) for i in self.skipped] for x in inputs
            ]
        if not self.orders or slabs[self.runs] != full:
            return None
        parts = list(hidden.split(unit))
        clock = self.state.clock_on(hidden)
        ranks = self._ranks_of(hidden)
        for branch, perturbation in self.orders:
            at = branch - self.branches
            tokens = self.state.num_image if self.holds_text else hidden.shape[1]
            if ranks is not None:
                tokens = ranks.image
            order = perturbation.permutation(tokens, self.index, clock)
            parts[at] = self._in_order(parts[at], order, ranks)
        hidden = torch.cat(parts)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Append, or put back, the rows of the branches that have not come through the block."""
        slabs = self.state.slabs
        if slabs is None:
            return None
        runs, full = slabs[self.runs], slabs[SPLIT]
        several = isinstance(output, tuple)
        outputs = list(output) if several else [output]
        if self.skipped:
            kept, self._kept = self._kept, []
            pairs = zip(outputs, kept, strict=True)
            outputs = [None if x is None else self._put_back(x, k, runs, full) for x, k in pairs]
        elif self.shuffled and runs != full:
            outputs = [
                None if x is None else self._shuffle(x, name, runs)
                for x, name in zip(outputs, self.streams, strict=True)
            ]
        else:
            return None
        return tuple(outputs) if several else outputs[0]

    def forget(self) -> None:
        """Free what is kept between a block's begin and its end, where it has not ended."""
        self._kept = []

    def _branch(self, x: torch.Tensor, branch: int, unit: int, apart: bool) -> torch.Tensor:
        """The rows of a perturbed branch: those of cond where it has not begun."""
        if not apart:
            return x[-unit:]
        start = x.shape[0] - (self.branches - branch) * unit
        return x[start : start + unit]

    def _ranks_of(self, hidden: torch.Tensor) -> Any:
        """Who has the other tokens of a block's input; ``None`` where all are here."""
        ranks = self.state.ranks
        if ranks is None or ranks.whole(hidden.shape[1], text=self.holds_text):
            return None  # a hook of the block itself may cut what it is given
        return ranks

    def _in_order(self, x: torch.Tensor, order: torch.Tensor, ranks: Any) -> torch.Tensor:
        """``x`` with its image tokens in another order; text and padding stay where they are."""
        if not self.holds_text:
            return x.index_select(1, order) if ranks is None else ranks.in_order(x, order)
        rows, lengths = [], self.state.num_contexts
        here = order.shape[0] if ranks is None else ranks.own_image
        for index, row in enumerate(x.split(1)):
            start = 0 if self.image_first else lengths[index % len(lengths)]
            before, image, behind = row.tensor_split((start, start + here), dim=1)
            image = image.index_select(1, order) if ranks is None else ranks.in_order(image, order)
            rows.append(torch.cat([before, image, behind], dim=1))
        return torch.cat(rows)

    def _put_back(
        self, x: torch.Tensor, kept: list[torch.Tensor], runs: int, full: int
    ) -> torch.Tensor:
        unit = x.shape[0] // runs
        if self.state.ranks is not None and kept[0].shape[1] != x.shape[1]:
            kept = [self.state.ranks.part(one) for one in kept]  # the block's own hook has cut it
        parts = [x[: (full - self.branches) * unit]]
        waiting = iter(kept)
        for branch in range(self.branches):
            skipped = branch in self.skipped
            parts.append(next(waiting) if skipped else self._branch(x, branch, unit, runs == full))
        return torch.cat(parts)

    def _shuffle(self, x: torch.Tensor, name: str, runs: int) -> torch.Tensor:
        """``x`` with the rows of the perturbed branch behind it."""
        cond = x[-(x.shape[0] // runs) :]
        if name != "hidden_states":
            # text sees all image tokens, in whatever order
            return torch.cat([x, cond])
        clock, order = self.state.clock_on(x), None
        for perturbation, index in self.shuffled:
            new = perturbation.permutation(x.shape[1], index, clock)
            order = new if order is None else order[new]
        assert order is not None
        return torch.cat([x, cond.index_select(1, order)])


def perturbed_blocks(
    model: nn.Module,
    plan: BranchPlan,
    state: BranchState,
    blocks: Mapping[str, Actions],
    *,
    order: Sequence[str],
    streams: Mapping[str, tuple[Stream, ...]],
) -> list[tuple[nn.Module, PerturbedBlock]]:
    """The perturbed blocks of a model with their hooks.

    Args:
        blocks: what happens to each branch in each block, by name.
        order: names of all transformer blocks; a block's place there picks its random numbers.
        streams: what the blocks return in order, by the blocks' class name; the image if omitted.
    """
    index = {name: i for i, name in enumerate(order)}
    found = []
    for name, actions in blocks.items():
        module = model.get_submodule(name)
        arrives, runs = plan.blocks.get(name, (SPLIT, SPLIT))
        found.append((name, module, actions, arrives, runs))
    # the block at the end of a run need not be perturbed itself
    if plan.shuffled and plan.shuffled[-1] not in blocks:
        last = plan.shuffled[-1]
        found.append((last, model.get_submodule(last), (None,), *plan.blocks[last]))
    made = []
    for name, module, actions, arrives, runs in found:
        ends = bool(plan.shuffled) and name == plan.shuffled[-1]
        run: Any = [(blocks[b][0], index[b]) for b in plan.shuffled if b in blocks] if ends else ()
        kinds = [cls.__name__ for cls in type(module).__mro__]
        returned = next((streams[kind] for kind in kinds if kind in streams), IMAGE_ALONE)
        with_text = [
            stream.tokens
            for stream in returned
            if TEXT in stream.tokens and (stream.argument == "hidden_states" or len(returned) == 1)
        ]
        block = PerturbedBlock(
            state,
            actions,
            index=index[name],
            arrives=arrives,
            runs=runs,
            shuffled=run,
            streams=argument_order(returned),
            holds_text=bool(with_text),
            image_first=bool(with_text) and with_text[0][0] == IMAGE,
        )
        made.append((module, block))
    return made
