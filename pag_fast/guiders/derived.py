"""Guiders on a model that nobody has described: traced in front of cond's forward, and compared."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.registry import describe
from ..models.traced.description import complete
from ..models.traced.preserved import undisturbed
from ..models.traced.signatures import Signatures
from ..models.traced.trace import trace
from ..models.traced.turns import Turns
from ..runtime.access.entry import Entry
from ..runtime.access.lease import Owner
from ..runtime.compatibility import Compatibility, own_package
from ..runtime.loops.predictions import prediction_of
from ..runtime.separately import FAILURES, difference, said
from ..sharing.plan import argument_names
from ..sharing.resume import Known
from ..sharing.rows import BranchState
from .changes import Perturbed
from .resumption import Resumption, Run


class DerivedResumption(Resumption):
    """As :class:`Resumption`, for a denoiser whose description is derived from its forwards.

    The first perturbed forward with arguments of some signature is compared with one that runs
    from its beginning and perturbs by dense masks, and so is one more of each call, the last one
    first and then each in turn. If they differ, perturbed forwards run as a whole from then on,
    with a warning; if they differ even so, the guider refuses the model.
    """

    # its forwards are looked at
    is_known = False

    def __init__(
        self,
        model: nn.Module,
        state: BranchState,
        known: list[Known],
        perturbed: Perturbed,
        modules: dict[str, nn.Module],
    ) -> None:
        self._turn: float | None = None
        super().__init__(state, known, perturbed.changes, modules, perturbed.prepare)
        self._seen = self._known(model)
        # why nothing of the model is shared, or ""
        self.whole: str = describe(model).traced.reason
        self._signature: Any = None
        self._verified: set[Any] = set()
        # where the perturbed forward is among those of its call, from 0 to 1
        self.place = 0.0
        self._turns = Turns()
        self._apart = ""
        # of the model's own classes it is seen what they do with rows
        self.compatibility = Compatibility(passes_apart=True, own=own_package(model))

    def begin(self) -> None:
        super().begin()
        self._turn = None

    def fits(self, model: nn.Module) -> bool:
        return self._seen == self._known(model) and super().fits(model)

    @staticmethod
    def _known(model: nn.Module) -> tuple[int, str]:
        traced = describe(model).traced
        return traced.changes, traced.reason

    def see(
        self,
        entry: Entry,
        owner: Owner,
        model: nn.Module,
        signatures: Signatures,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Have the model traced for arguments like these; whether this still fits it.

        Raises:
            ValueError: it cannot be traced, or it has no attention that can be perturbed.
        """
        call = {**dict(zip(argument_names(model), args, strict=False)), **kwargs}
        signature, traced = signatures.of(model, call), describe(model).traced
        if signature not in traced.tokens:
            with entry.alone(owner):
                seen = trace(model, call)
            complete(model, signature, seen, call)
        if not self.fits(model):
            return False
        self._signature, self.state.tokens = signature, traced.tokens[signature]
        return True

    def _perturbed(
        self,
        model: nn.Module,
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        apart: str,
    ) -> Any:
        apart = apart or self._apart
        known = self._signature in self._verified
        if known and not self._is_turn():
            return super()._perturbed(model, run, args, kwargs, apart)
        try:
            truth = self._densely(model, run, args, kwargs)
        except FAILURES as error:
            raise self._refusal(model, said(error)) from error
        try:
            out = super()._perturbed(model, run, args, kwargs, apart)
        except (*FAILURES, ValueError) as error:
            why = said(error)
        else:
            why = difference(prediction_of(out), prediction_of(truth))
            if not why:
                self._verified.add(self._signature)
                return out
        if self.reason:
            raise self._refusal(model, why)
        since = "; steps since the last comparison may have been wrong" if known else ""
        self._apart = f"what was resumed is not what a whole forward gives ({why}){since}."
        self.reason = self._apart
        self._verified.clear()
        return truth

    def _is_turn(self) -> bool:
        """Whether this step of the call is the one that is compared behind the first."""
        if self._turn is None:
            self._turn = self._turns.next(self._signature)
        if not self.place or self.place < self._turn:
            return False
        self._turn = 2.0  # not again in this call
        return True

    def _densely(
        self, model: nn.Module, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The perturbed forward from its beginning, by masks over all pairs of tokens."""
        before = self.state.tokens
        self.state.tokens = {name: x.densely() for name, x in before.items()}
        self.state.slabs = (0, 0, 1)
        try:
            with undisturbed(model, (args, kwargs)):
                return run(self.changes, args, kwargs)
        finally:
            self.state.slabs, self.state.tokens = None, before

    @staticmethod
    def _refusal(model: nn.Module, why: str) -> ValueError:
        return ValueError(
            f"PAG in {type(model).__name__}, whose description was derived, is not what dense "
            f"masks say ({why}): choose other layers, or describe the model as CONTRIBUTING.md "
            "says."
        )
