"""Forwards that a stock pipeline makes to guide by, begun where they part from cond's.

SD3's skip-layer guidance and LTX-2's spatio-temporal guidance run the denoiser once more in a step,
on cond's arguments and with some blocks changed. The blocks in front of these see what they saw in
the forward that holds cond: its rows of the last one's output are kept, and handed out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.registry import uncompiled
from ..pipelines.description import StockGuidance
from ..sharing.arguments import complete_rows, latents_of
from ..sharing.plan import compiled_call, has_diffusers_hooks
from ..sharing.resume import Known
from ..sharing.row_equality import RowEquality
from ..sharing.rows import BranchState
from .access.forwards import Call, Forward
from .access.frames import nobody_writes
from .access.instance_patch import InstancePatch
from .basic_state import BasicState
from .compatibility import Answer
from .compatibility.findings import Findings
from .recording import Record, Replay

RESUMED = "stock guidance resumed"
"""What counters call a forward that began behind its first blocks."""

# what has to see every module run in every forward
_WHOLE = (Answer.UNSHARED, Answer.KEEP_ROWS, Answer.NOTHING_KEPT)


class _Rows:
    """Which rows of a forward are cond's: the slab ``cond``, or the last one there is."""

    unit = 0
    cond = 0

    def of(self, value: Any, *, copied: bool) -> Any:
        """Those of what a block has returned; memory of their own, where others are with them."""
        if isinstance(value, torch.Tensor):
            # up to a fork of PAG uncond and cond, or cond and perturbed, may be one
            slab = min(self.cond, value.shape[0] // self.unit - 1)
            mine = value[slab * self.unit : (slab + 1) * self.unit]
            return mine.clone() if copied and len(mine) != len(value) else mine
        if isinstance(value, tuple | list):
            return type(value)(self.of(item, copied=copied) for item in value)
        return value


class _CondRecord(Record):
    """Keeps cond's rows alone."""

    def __init__(self, state: BranchState, known: Known, rows: _Rows) -> None:
        super().__init__(state, known)
        self.rows = rows

    def note(self, out: Any) -> Any:
        return self.rows.of(super().note(out), copied=self.kept is None)


class _Fork:
    """What is put on the blocks in front of one block, to keep what they return or to hand it out.

    Args:
        fork: the index of the first block that is changed.
    """

    def __init__(
        self, state: BranchState, blocks: Sequence[nn.Module], fork: int, rows: _Rows
    ) -> None:
        last = fork - 1
        known = [
            Known("", block, None if index == last else frozenset())
            for index, block in enumerate(blocks[:fork])
        ]
        self.records = [_CondRecord(state, item, rows) for item in known]
        self.replays = [Replay(record) for record in self.records]
        inner = [module for block in blocks[:fork] for module in block.modules()]
        self.is_usable = not any(x.training or has_diffusers_hooks(x) for x in inner)

    def drop(self) -> None:
        for record in self.records:
            record.take()


class StockPasses:
    """Those of one denoiser in one call of its pipeline.

    Args:
        patch: whose counters are told.
        denoiser: as the pipeline has it.
        guidance: what the pipeline's description says of such forwards.
        graphs: forwards are recorded as graphs, in which nothing can be replaced.
    """

    def __init__(
        self,
        patch: BasicState,
        pipe: Any,
        denoiser: Any,
        guidance: StockGuidance,
        *,
        graphs: bool = False,
    ) -> None:
        model = uncompiled(denoiser)
        self.patch = patch
        self.pipe = pipe
        self.guidance = guidance
        self.state = BranchState()
        self._model = model
        self._equality = RowEquality(nobody_writes)
        self._forks: dict[int, _Fork] = {}
        self._values: list[Any] = []
        self._inputs: dict[str, list[Any]] = {}
        self._fork = 0
        # of the forward that runs: what records
        self._recording: _Fork | None = None
        self._rows = _Rows()
        self._compared = False
        self._compiled = model is not denoiser or compiled_call(model) is not None
        self._graphs = graphs

    def forget(self) -> None:
        """Free what was kept of a forward."""
        self._values, self._inputs = [], {}
        for fork in self._forks.values():
            fork.drop()
        self._recording = None
        self.state.slabs = None

    def enter(
        self, call: Mapping[str, Any], local: Mapping[str, Any], found: Findings
    ) -> InstancePatch:
        """What is put on the denoiser for a forward, in front of everything else.

        Args:
            call: its arguments by name, as the pipeline's loop has given them.
            local: the locals of the loop.
        """
        changed = call.get(self.guidance.argument)
        if changed:
            return self._resume(call, changed, found)
        self.forget()
        if any(call.get(name) for name in self.guidance.others):
            return InstancePatch.nothing()
        fork = self._first(self.guidance.changed(self.pipe, local))
        latents, own = latents_of(dict(call)), local.get("latents")
        if not fork or not isinstance(own, torch.Tensor) or self._why_not(fork, found):
            return InstancePatch.nothing()
        rows, unit = latents.shape[0], own.shape[0]
        if not unit or rows % unit:
            return InstancePatch.nothing()
        self._fork, self._rows.unit, self._rows.cond = fork, unit, rows // unit - 1
        same = self._equality.same_objects(dict(call), rows, "cond")
        self._compared = self._compared and same
        # some models take things out of their arguments
        self._inputs = _leaves_by_name(call, self.guidance, rows, unit)
        self._recording = self._at(fork)
        return InstancePatch([record.entry() for record in self._recording.records])

    def run(
        self,
        forward: Forward,
        make: Callable[[], InstancePatch],
        states: tuple[BranchState, ...],
        call: Call,
    ) -> Any:
        """A forward with what :meth:`enter` has returned among what ``make`` puts on."""
        try:
            out = forward.run(make, (*states, self.state), call)
        except BaseException:
            self.forget()
            raise
        self._leave()
        return out

    def _leave(self) -> None:
        """The forward has ended by itself: keep cond's part of what was recorded."""
        self.state.slabs = None
        if self._recording is None:
            self.forget()
            return
        records, self._recording = self._recording.records, None
        intact = all(record.is_intact() for record in records)
        values = [record.take() for record in records]
        self._values = values if intact else []

    def _resume(self, call: Mapping[str, Any], changed: Any, found: Findings) -> InstancePatch:
        fork = self._first(changed)
        reason = self._why_not(fork, found) if fork else ""
        if fork and not reason:
            reason = self._differs(call, fork)
        if not fork or reason:
            self.forget()
            if reason:
                self.patch.fall_back(f"{self.guidance.name} runs as a whole: {reason}")
            return InstancePatch.nothing()
        there = self._at(self._fork)
        for record, value in zip(there.records, self._values, strict=True):
            record.value = value
        self._values, self._inputs = [], {}
        self.patch.steps[RESUMED] += 1
        self.state.slabs = (0, 0, 1)
        return InstancePatch([replay.entry() for replay in there.replays])

    def _at(self, fork: int) -> _Fork:
        if fork not in self._forks:
            blocks = getattr(self._model, self.guidance.blocks)
            self._forks[fork] = _Fork(self.state, blocks, fork, self._rows)
        return self._forks[fork]

    def _first(self, changed: Any) -> int:
        return first_changed(self._model, self.guidance, changed)

    def _why_not(self, fork: int, found: Findings) -> str:
        """Why nothing can be taken over from another forward, or ``""``."""
        if self._compiled:
            return "the denoiser is compiled."
        if self._graphs:
            return "forwards are recorded as graphs."
        whole = [answer for answer in _WHOLE if answer in found.answer]
        if whole:
            return found.why(whole[0])
        if not self._at(fork).is_usable:
            return "hooks of diffusers run with the blocks in front, or these are in training."
        return ""

    def _differs(self, call: Mapping[str, Any], fork: int) -> str:
        if not self._values or fork < self._fork:
            return "nothing usable was kept of cond's forward."
        rows = latents_of(dict(call)).shape[0]
        same = self._equality.same_objects(dict(call), rows, "changed")
        if rows != self._rows.unit:
            return "it has other rows than cond's."
        now = _leaves_by_name(call, self.guidance, rows, rows)
        if not _equal(self._inputs, now, values=not (same and self._compared)):
            self._compared = False
            return "it was called with other arguments than cond's."
        self._compared = True
        return ""


def first_changed(model: Any, guidance: StockGuidance, changed: Any) -> int:
    """The index of the first block that is changed; 0 where there is nothing to be had."""
    blocks = len(getattr(model, guidance.blocks))
    return min((x for x in changed or () if isinstance(x, int) and 0 <= x < blocks), default=0)


class OnTop(InstancePatch):
    """A patch that goes on behind another one: what it displaces may be a part of that."""

    def __init__(self, below: InstancePatch, above: InstancePatch) -> None:
        super().__init__(())
        self.entries = [*below.entries, *above.entries]
        self.below, self.above = below, above

    def on(self) -> list[Any]:
        below = self.below.on()
        return [below, self.above.on()]

    def off(self, before: list[Any]) -> None:
        self.above.off(before[1])
        self.below.off(before[0])


def _leaves_by_name(
    call: Mapping[str, Any], guidance: StockGuidance, rows: int, unit: int
) -> dict[str, list[Any]]:
    """Every argument but those that say what is changed, with the last ``unit`` of ``rows``."""
    left_out = (guidance.argument, *guidance.others, *guidance.with_it)
    return {
        name: list(_leaves(value, rows, unit))
        for name, value in complete_rows(dict(call), rows, 1).items()
        if value is not None and name not in left_out
    }


def _leaves(value: Any, rows: int, unit: int) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value[rows - unit :] if value.ndim and value.shape[0] == rows else value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item, rows, unit)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item, rows, unit)
    else:
        yield value


def _equal(before: dict[str, list[Any]], now: dict[str, list[Any]], *, values: bool) -> bool:
    if before.keys() != now.keys():
        return False
    for name, leaves in before.items():
        others = now[name]
        if len(leaves) != len(others):
            return False
        for a, b in zip(leaves, others, strict=True):
            if not (a is b or _same(a, b, values=values)):
                return False
    return True


def _same(a: Any, b: Any, *, values: bool) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and (not values or torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)
