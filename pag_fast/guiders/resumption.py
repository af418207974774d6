"""Forwards of one denoiser: cond's is recorded, the perturbed one begins where the two part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from ..models.layer_names import self_attentions
from ..runtime.access.instance_patch import Entry
from ..runtime.compatibility.findings import Findings
from ..runtime.compatibility.hooks import has_other_hooks
from ..runtime.ranks.parallelism import share
from ..runtime.recording import Record, Replay
from ..sharing.plan import argument_names
from ..sharing.resume import Known
from ..sharing.rows import BranchState
from ..sharing.sequence import OutOfOrder
from ..sharing.threads import HERE
from .unchanged import Arguments, Unchanged, leaves

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_skip"


class Change(Protocol):
    """What makes a forward the perturbed one."""

    def entry(self) -> Entry:
        """What is put on the model, ready for an instance patch."""


Run = Callable[[Sequence[Change], tuple[Any, ...], dict[str, Any]], Any]
"""Runs the model on ``args`` and ``kwargs`` with changes on it."""


class Resumption:
    """Runs a denoiser's forwards of one guided step; between them nothing of it is changed.

    The objects that are put on the model are made once, as compiled graphs guard on them, and do
    something only in the thread whose forward runs.

    Args:
        state: of the model: what all these objects read.
        known: what need not run again in the perturbed forward.
        changes: what is perturbed.
        modules: every module of the model that was looked at, by name.
        prepare: called with the model and the arguments of a perturbed forward before it runs.
    """

    def __init__(
        self,
        state: BranchState,
        known: Sequence[Known],
        changes: Sequence[Change],
        modules: dict[str, nn.Module],
        prepare: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self.state = state
        self.records = [Record(state, item) for item in known]
        self.replays = [Replay(record) for record in self.records]
        self.changes = changes
        self.modules = modules
        self._prepare = prepare
        self._found: Findings | None = None
        self._unchanged: Unchanged | None = None
        self._looks = 0
        # why the perturbed forward last ran as a whole, or ""
        self.reason = ""
        self.begin()

    def begin(self) -> None:
        """Begin a call of a pipeline: what was recorded is of no use, and all is checked anew."""
        self.forget()
        # places of arguments that were other objects than cond's, of equal values
        self._equal_so_far: frozenset[int] = frozenset()
        self._usable: bool | None = None

    def forget(self) -> None:
        """Free everything that was recorded."""
        self._values: list[Any] | None = None
        self._inputs = Arguments()
        self._has_run = False
        for record in self.records:
            record.take()
        if self._unchanged is not None:
            self._unchanged.forget()

    @property
    def is_known(self) -> bool:
        """Whether nothing is looked at while forwards run, which no graph could do."""
        return all(getattr(change, "is_known", True) for change in self.changes)

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the modules this was made for."""
        found = dict(model.named_modules())
        return all(found.get(name) is module for name, module in self.modules.items())

    def forward(
        self,
        model: nn.Module,
        branch: str,
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        traced: bool,
        resumed: bool,
        apart: str = "",
        found: Findings | None = None,
        looks: int = 0,
    ) -> Any:
        """The forward of one branch.

        Args:
            run: runs the model with what it is given on it, while nobody else does.
            traced: the model is compiled as a whole. All forwards but the perturbed one then run
                with the same changes, so that they share a graph.
            resumed: a perturbed forward follows cond's in this step.
            apart: why no forward may be taken over from another one, if there is a reason.
            found: what others have put on the model.
            looks: another number whenever that has changed.
        """
        self.state.thread, self._found, self._looks = HERE.me, found, looks
        try:
            if branch == PERTURBED:
                return self._perturbed(model, run, args, kwargs, apart)
            resumed = resumed and not apart
            return self._recorded(model, branch, run, args, kwargs, traced, resumed)
        finally:
            self.state.thread = self._found = None

    def _recorded(
        self,
        model: nn.Module,
        branch: str,
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        traced: bool,
        resumed: bool,
    ) -> Any:
        wanted = resumed and branch == COND and self._is_usable()
        if not wanted and not traced:
            return run((), args, kwargs)
        # a pass of several forwards, over windows of a video say, has more than one state to keep
        repeated = self._has_run
        if wanted:
            self.forget()
            self._has_run = True
        try:
            # some models take things out of their arguments
            inputs = Arguments((args, kwargs)) if wanted else self._inputs
            out = run(self.records, args, kwargs)
            intact = traced or all(record.is_intact() for record in self.records)
            if wanted and intact and not repeated:
                self._values = [record.take() for record in self.records]
                self._inputs = inputs
                if self._unchanged is None:
                    self._unchanged = Unchanged(model)
                self._unchanged.note(model, self._looks)
        finally:
            self._drop()
        return out

    def _perturbed(
        self,
        model: nn.Module,
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        apart: str,
    ) -> Any:
        values = self._values
        self.reason = self._why_not(model, args, kwargs, apart)
        changes: list[Change] = list(self.changes)
        try:
            if not self.reason:
                assert values is not None
                for record in self.records:
                    record.value = values.pop(0)
                changes += self.replays
            if self._prepare is not None:
                self._prepare(model, args, kwargs)
            if self._found is not None and self._found.parallel:
                call = {**dict(zip(argument_names(model), args, strict=False)), **kwargs}
                share(self.state, model, self_attentions(model), call, self._found)
            # no row attends: the batch holds perturbed rows alone
            self.state.slabs, self.state.entered = (0, 0, 1), 0
            try:
                return run(changes, args, kwargs)
            except OutOfOrder as error:
                self.reason = f"{error}."
                self.state.entered = 0
                return run(list(self.changes), args, kwargs)
        finally:
            self.state.slabs = None
            self.state.ranks, self.state.head_rank = None, 0
            self.forget()

    def _why_not(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], apart: str
    ) -> str:
        """Why the perturbed forward has to run from its beginning, or ``""``."""
        if not self._is_usable():
            return "hooks of diffusers run with the modules in front."
        if apart:
            return apart
        if self._values is None or self._unchanged is None:
            return "nothing usable was recorded in cond's forward."
        if not self._has_conds(leaves((args, kwargs))):
            return "it was called with other arguments than cond's, or they were written into."
        return self._unchanged.why_not(model, self._looks)

    def _has_conds(self, now: list[Any]) -> bool:
        """Whether arguments are those of cond's forward.

        Values are compared, which waits for the device, where another argument than in the steps
        before is another object than cond's.
        """
        others = self._inputs.others(now)
        known = others <= self._equal_so_far
        same = self._inputs.equal(now, values=not known)
        if not known:
            self._equal_so_far = others if same else frozenset()
        return same

    def _is_usable(self) -> bool:
        """Whether a forward may be taken over from another: no hooks that expect it."""
        if self._usable is None:
            roots = [record.module for record in self.records]
            inner = [module for root in roots for module in root.modules()]
            self._usable = not any(map(has_other_hooks, inner))
        return self._usable

    def _drop(self) -> None:
        for record in self.records:
            record.take()
