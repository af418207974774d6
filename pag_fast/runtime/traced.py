"""A call of a pipeline whose denoiser nobody has described: traced first, and checked once.

The first forward with arguments of some signature is preceded by a trace, which completes the
model's description. What is then shared is compared, once for each signature, with forwards of the
branches by themselves: cond and what comes before it through the model as it is, the perturbed rows
alone and by dense masks. If they differ the branches run apart, with a warning; if they differ even
then, the call is refused. A model may do something else at later timesteps: one step more of each
call is compared, the last one first and then each in turn, and in every forward it is noted in
which order the modules run that rest on each other.
"""

from __future__ import annotations

from typing import Any

from ..models.registry import COND, PERTURBED, describe
from ..models.traced.description import complete
from ..models.traced.signatures import Signatures
from ..models.traced.trace import trace
from ..sharing.rows import SPLIT
from ..sharing.sequence import OutOfOrder, Sequence
from ..sharing.tokens import Tokens
from .access.forwards import Call, Forward
from .compatibility.findings import Findings
from .injected import InjectedSession
from .loops.predictions import prediction_of
from .separately import FAILURES, Separately, said


class TracedSession(InjectedSession):
    """As :class:`InjectedSession`, for a denoiser with a derived description."""

    _signature: Any = None
    # what was known of the model when its plan was taken
    _installed: tuple[int, str] = (0, "")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._signatures = Signatures()
        self._tokens: dict[Any, dict[str, Tokens]] = {}
        # where in this call it is compared again, and what has been
        self._turn: dict[Any, float] = {}
        self._compared: set[Any] = set()

    @property
    def _traced(self) -> Any:
        return describe(self.installed.denoiser).traced

    def _known(self) -> tuple[int, str]:
        return self._traced.changes, self._traced.reason

    def install(self, layers: Any) -> None:
        super().install(layers)
        self._installed = self._known()
        places = self.installed.plan.sequence
        self.installed.state.sequence = Sequence(places) if places else None

    def _tell_unshared(self) -> None:
        if self._traced.trace is not None:
            super()._tell_unshared()

    def enter_denoiser(self, forward: Forward, found: Findings) -> Call:
        self._trace(forward.call)
        return super().enter_denoiser(forward, found)

    def _trace(self, call: Call) -> None:
        """Have the model traced for arguments like these.

        Raises:
            ValueError: it cannot be, or it has no attention that can be perturbed.
        """
        model = self.installed.denoiser
        self._signature = self._signatures.of(model, call)
        if self._signature not in self._traced.tokens:
            with self.patch.alone(self.denoiser, self.owner):
                seen = trace(model, call)
            complete(model, self._signature, seen, call)
        # most traces show nothing new but tokens: what the call keeps stays good
        if self._installed != self._known():
            self._install_anew()

    def _install_anew(self) -> None:
        """Take what is known of the model now, in the middle of a call that goes on as it was."""
        somebody_writes = self._kept.somebody_writes
        self.installed.left()
        self.install(self.patch.layers)
        self._kept.somebody_writes = somebody_writes
        self._tell_unshared()

    # ---- tokens, and the comparison ----

    def _prepare(self, call: Call, layout: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
        slabs = [row for row in layout if row != PERTURBED]
        own = slabs[::-1] if self._cond_first else slabs
        key = self._signature, own.index(COND), len(own)
        if key not in self._tokens:
            tokens = self._traced.tokens[self._signature]
            self._tokens[key] = {n: x.slab(key[1], key[2]) for n, x in tokens.items()}
        self.installed.state.tokens = self._tokens[key]
        super()._prepare(call, layout, *args, **kwargs)

    def _run(self, forward: Forward, call: Call, found: Findings) -> Any:
        state, installed, traced = self.installed.state, self.installed, self._traced
        chosen = self._signature, installed.plan.order, installed.branches
        known = chosen in traced.verified
        if state.slabs is None or traced.written or (known and not self._is_turn(chosen)):
            return self._trusted(forward, call, found)
        full = state.slabs[SPLIT]
        try:
            truth = Separately.run(forward, call, installed, full, traced.verified.get(chosen))
        except FAILURES as error:
            if known:  # what has nothing to do with us is raised here again
                self._trusted(forward, call, found)
            raise self._refusal(said(error)) from error
        try:
            out = self._in_order(forward, call, found)
        except (*FAILURES, ValueError) as error:
            why = said(error)
        else:
            why = truth.differs(prediction_of(out))
            if why and known:  # rounding may be another one here
                truth = Separately.run(forward, call, installed, full)
                why = truth.differs(prediction_of(out))
            if not why:
                traced.verified[chosen] = truth.rounding
                return out
        if state.slabs == (full,) * 3:
            raise self._refusal(why)
        since = "; steps since the last comparison may have been wrong" if known else ""
        return self._apart(forward, call, found, why, since)

    def _is_turn(self, chosen: Any) -> bool:
        """Whether this step of the call is the one that is compared behind the first."""
        step = self.loop.step
        if chosen in self._compared or step <= 0:
            return False
        if chosen not in self._turn:
            self._turn[chosen] = self._traced.turns.next(chosen)
        # of steps whose scale varies it is known which have one
        ahead = list(self._ahead())
        # a scheduler of the user's own may have no timesteps: any step is as good then
        timesteps = getattr(self.pipe.scheduler, "timesteps", ())
        steps = step + len(ahead) if ahead[1:] else len(timesteps)
        is_last = step + 1 >= steps or (len(ahead) > 1 and not any(ahead[1:]))
        if not is_last and step < self._turn[chosen] * (steps - 1):
            return False
        self._compared.add(chosen)
        return True

    def _in_order(self, forward: Forward, call: Call, found: Findings) -> Any:
        """A forward; raises OutOfOrder where what is shared rests on modules that ran otherwise."""
        sequence = self.installed.state.sequence
        if sequence is None:
            return super()._run(forward, call, found)
        sequence.begin()
        out = super()._run(forward, call, found)
        sequence.end()
        return out

    def _trusted(self, forward: Forward, call: Call, found: Findings) -> Any:
        """A forward that is compared with none: apart, where sharing fails."""
        state = self.installed.state
        shared = state.slabs
        try:
            return self._in_order(forward, call, found)
        except FAILURES as error:
            why = said(error)
            if shared is None or shared == (shared[SPLIT],) * 3:
                raise
            if not isinstance(error, OutOfOrder):
                # it may have been raised by what has nothing to do with sharing
                try:
                    state.slabs = (shared[SPLIT],) * 3
                    super()._run(forward, call, found)
                except FAILURES:
                    raise error from None
            return self._apart(forward, call, found, why)

    def _apart(
        self, forward: Forward, call: Call, found: Findings, why: str, since: str = ""
    ) -> Any:
        """Share nothing of this model from here on."""
        state, traced = self.installed.state, self._traced
        assert state.slabs is not None
        traced.reason = f"sharing branches of this model is not exact ({why})"
        traced.verified.clear()
        self.patch.fall_back(f"branches are not shared: {traced.reason}{since}")
        state.slabs = (state.slabs[SPLIT],) * 3
        return self._run(forward, call, found)

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"PAG in {type(self.installed.denoiser).__name__}, whose description was derived, "
            f"is not what separate forwards say ({why}): choose other layers, or describe the "
            "model as CONTRIBUTING.md says."
        )
