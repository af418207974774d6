"""The life of a step: the main pass is recorded, the perturbed pass resumes from the record.

ComfyUI asks a model for its predictions through three functions that may be wrapped:
``predict_noise`` (a step), ``calc_cond_batch`` (all conditionings at one point of a step) and
``apply_model`` (one batch of them, as memory allows). :class:`Sharing` wraps these three, and
``outer_sample`` (a whole sampling), without touching a class or a module: it records in the first
``calc_cond_batch`` of a step and resumes in the one that :meth:`Sharing.perturbed` makes.

Nothing is predicted: an entry of the conditioning resumes only if it was seen in this step's main
pass, once, whole, with the same inputs and the same patches. Otherwise its perturbed pass is
computed whole, which is slower and right.

Where other nodes act on the model, equal inputs are not enough: a patch may look at the other rows
of the batch, or at something of its own. The first perturbed pass of a sampling is then computed
whole and compared with the record at the fork (mode "check"); it resumes from the next step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from . import control, others
from .inputs import equal, rows_of
from .others import KEY, signature
from .record import Entry, Run, Step
from .report import Report


class Plan(Protocol):
    """Where the perturbed pass leaves the main pass in one kind of denoiser."""

    def supports(self, net: torch.nn.Module) -> str | None:
        """Why nothing can be shared with ``net``; None if it can."""

    def behind(self, net: torch.nn.Module, kind: str, where: Any) -> bool:
        """Whether other nodes' patches of ``kind``, or the one at ``where``, wait for the fork."""

    def record(
        self, net: torch.nn.Module, entries: list[tuple[Entry, slice]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with patches that keep what is needed of ``entries``."""

    def complete(self, net: torch.nn.Module, entry: Entry) -> bool:
        """Whether all that is needed has been kept of ``entry``."""

    def resume(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with patches that hand out what was kept up to the fork."""

    def check(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with patches that compare a whole pass with what was kept."""


def predicted(args: dict[str, Any], cond: Any, options: dict[str, Any]) -> torch.Tensor:
    """The prediction [B, C, ...] of ``cond`` at the point of a post-CFG function's ``args``."""
    model, x, sigma = args["model"], args["input"], args["sigma"]
    options = others.without_compilation(options)
    return comfy.samplers.calc_cond_batch(model, [cond], x, sigma, options)[0]


def denoiser(model: Any) -> torch.nn.Module:
    """The denoiser of a ``BaseModel``, without the wrapper of ``torch.compile``."""
    net = model.diffusion_model
    return getattr(net, "_orig_mod", net)


class Sharing:
    """Lets the perturbed pass of one patched model resume from its main pass.

    Args:
        plan: what to keep and to hand out, for one kind of denoiser.
        active: whether guidance acts at a noise level (sigma [B]); elsewhere nothing is kept.

    Attributes:
        report: says why something is computed whole.
        resumed: whether the last perturbed pass has resumed anywhere.
    """

    def __init__(self, plan: Plan, active: Callable[[torch.Tensor], bool]) -> None:
        self.plan, self.active, self.report = plan, active, Report()
        self.run: Run | None = None
        self.step: Step | None = None
        self.resumed = False

    def attach(self, patcher: Any) -> None:
        """Wrap the four functions for ``patcher`` (a ``ModelPatcher``) alone."""
        for kind, function in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.APPLY_MODEL, self.apply_model),
        ):
            patcher.add_wrapper_with_key(kind, KEY, function)

    # -- wrappers ---------------------------------------------------------------------------

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin and end a sampling; nothing of it outlives it, however it ends."""
        before, self.run = self.run, Run()
        try:
            return executor(*args, **kwargs)
        finally:
            self.run = before

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin and end a step; a cancelled run leaves no tensor alive."""
        before, self.step = self.step, Step()
        try:
            return executor(*args, **kwargs)
        finally:
            self.step = before

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Any, sigma: Any, options: dict[str, Any]
    ) -> Any:
        """Record the step's first call, which is the main one."""
        step = self.step
        if step is None or step.begun or step.mode != "off" or not self.active(sigma):
            return executor(model, conds, x, sigma, options)
        step.begun = True
        reason = self._refusal(model, options)
        if reason is not None:
            self.report.whole(type(denoiser(model)).__name__, reason)
            return executor(model, conds, x, sigma, options)
        step.x, step.sigma, step.patches = x, sigma, signature(options)
        step.all_conds = len(conds) > 2
        to = options.get("transformer_options", {})
        step.doubted = "model_function_wrapper" in options or self._acted_on(model, to)
        step.watched = step.doubted or others.act_between(options)
        step.mode = "record"
        drawn = others.random_state(x.device) if self._watches(step) else None
        try:
            return executor(model, conds, x, sigma, options)
        finally:
            step.mode = "off"
            if drawn is not None and drawn != others.random_state(x.device):
                # layers that are left out would draw no numbers, and all that follow be others
                self._give_up(denoiser(model), "random numbers are drawn in the main pass")

    def apply_model(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Record or resume one batch of conditionings."""
        options = {} if transformer_options is None else transformer_options
        step, net = self.step, denoiser(executor.class_obj)
        if step is not None and step.mode != "off":
            named = {"x": x, "t": t, "concat": c_concat, "cross": c_crossattn, **kwargs}
            if step.mode == "record":
                step.doubted = step.doubted or self._acted_on(executor.class_obj, options)
                return self._record(
                    step, net, named, control, options,
                    lambda to: executor(x, t, c_concat, c_crossattn, control, to, **kwargs),
                )  # fmt: skip
            options = self._resume(step, net, named, options)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    # -- the main pass ----------------------------------------------------------------------

    def _refusal(self, model: Any, options: dict[str, Any]) -> str | None:
        if options.get("context_handler") is not None:
            return "context windows split it"
        if "multigpu_clones" in options:
            return "several GPUs compute it"
        if self.run is not None and self.run.whole is not None:
            return self.run.whole
        return self.plan.supports(denoiser(model))

    def _record(
        self,
        step: Step,
        net: torch.nn.Module,
        named: dict[str, Any],
        residuals: Any,
        options: dict[str, Any],
        run: Callable[[dict[str, Any]], Any],
    ) -> Any:
        x, uuids = named["x"], options.get("uuids", [])
        assert step.x is not None
        rows = step.x.shape[0]
        if not uuids or x.shape[0] != rows * len(uuids):
            self.report.whole(type(net).__name__, "a wrapper splits the batch in its own way")
            return run(options)
        wanted = self.run.wanted if self.run is not None else None
        new: list[tuple[Entry, slice]] = []
        for i, (uuid, index) in enumerate(zip(uuids, options["cond_or_uncond"], strict=True)):
            if (uuid not in wanted) if wanted else (index != 0 and not step.all_conds):
                continue
            if uuid in step.entries:
                step.entries[uuid].spoiled = "the main pass computes it in several parts"
                step.entries[uuid].control = None  # it may be that of one part alone
                continue
            where = slice(i * rows, (i + 1) * rows)
            values = self._watches(step) or self.run is None or uuid not in self.run.compared
            entry = Entry(
                rows_of(named, where, x.shape[0], clone=values),
                control=control.rows_of(residuals, where, x.shape[0]),
                beside=tuple(options["cond_or_uncond"]),
                valued=values,
                doubted=step.doubted,
            )
            step.entries[uuid] = entry
            new.append((entry, where))
        out = run(self.plan.record(net, new, options) if new else options)
        for entry, _ in new:
            if entry.spoiled is None and not self.plan.complete(net, entry):
                # a cache in between may have left the forward out
                entry.spoiled = "its main pass was not seen in its blocks"
            if entry.remembers:
                self._give_up(net, "a patch of another node remembers what it was called with")
        return out

    def _acted_on(self, model: Any, to: dict[str, Any]) -> bool:
        net = denoiser(model)
        return others.act_on(to, lambda kind, where: self.plan.behind(net, kind, where))

    def _watches(self, step: Step) -> bool:
        """Whether values are compared in this step: in the first one, and beside other nodes."""
        return step.watched or step.doubted or self.run is None or not self.run.compared

    def _give_up(self, net: torch.nn.Module, reason: str) -> None:
        """Nothing is resumed any more in this sampling."""
        self.report.whole(type(net).__name__, reason)
        if self.run is not None:
            self.run.whole = reason
        if self.step is not None:
            for entry in self.step.entries.values():
                entry.spoiled, entry.control = reason, None

    # -- the perturbed pass -----------------------------------------------------------------

    def perturbed(self, args: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
        """The perturbed prediction of cond [B, C, ...], resumed where the step allows it.

        Args:
            args: what ComfyUI hands to a post-CFG function.
            options: ``args["model_options"]`` with the perturbation in its patches.
        """
        cond = args["cond"]
        self.resumed = False
        with self._resuming(args) as step:
            if step is not None and step.mode == "resume":
                cond = control.stand_ins(cond, step.entries, step.x.shape[0])
            return predicted(args, cond, options)

    @contextmanager
    def _resuming(self, args: dict[str, Any]) -> Iterator[Step | None]:
        step, net = self.step, denoiser(args["model"])
        reason = self._stale(step, args)
        if step is None or reason is not None:
            if step is not None and step.x is not None:
                self.report.whole(type(net).__name__, str(reason))
            yield None
            return
        if self.run is not None:
            self.run.wanted = {entry["uuid"] for entry in args["cond"]}
        point = self._point(step)
        known = self.run is not None and any(others.same(point, one) for one in self.run.trusted)
        step.mode = "resume" if known or not step.doubted else "check"
        try:
            yield step
            if step.mode == "check":
                self._judge(step, net, point)
        finally:
            step.mode = "off"
            step.entries, step.checked = {}, []

    def _point(self, step: Step) -> list[Any]:
        """What a check holds for: the patches, and which rows were together in the main pass."""
        together = [(str(uuid), one.beside) for uuid, one in step.entries.items()]
        return [*step.patches, str(sorted(together))]

    def _judge(self, step: Step, net: torch.nn.Module, point: list[Any]) -> None:
        if any(entry.alike is False for entry in step.checked):
            self._give_up(net, "other nodes have it compute something else than the main pass")
        elif step.checked and self.run is not None and all(one.alike for one in step.checked):
            self.run.trusted.append(point)

    def _stale(self, step: Step | None, args: dict[str, Any]) -> str | None:
        """Why the record of this step does not belong to what is asked now."""
        if step is None or step.x is None:
            return "nothing was recorded"
        if self.run is not None and self.run.whole is not None:
            return self.run.whole
        for before, now in ((step.x, args["input"]), (step.sigma, args["sigma"])):
            if before is not now and not torch.equal(before, now):
                return "it is asked at another point than the main pass"
        if not others.same(step.patches, signature(args["model_options"])):
            return "other patches act on it than on the main pass"
        return None

    def _resume(
        self, step: Step, net: torch.nn.Module, named: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        x, uuids = named["x"], options.get("uuids", [])
        assert step.x is not None
        rows = step.x.shape[0]
        if not uuids or x.shape[0] != rows * len(uuids):
            return options
        entries: list[Entry] = []
        for i, uuid in enumerate(uuids):
            entry = step.entries.get(uuid)
            now = rows_of(named, slice(i * rows, (i + 1) * rows), x.shape[0])
            reason = "its conditioning was not in the main pass" if entry is None else entry.spoiled
            if entry is not None and reason is None and not equal(entry.inputs, now, entry.valued):
                # what changes between the passes once may do so in any step
                self._give_up(net, "it is called with other inputs than the main pass")
                return options
            if entry is None or reason is not None:
                self.report.whole(type(net).__name__, str(reason))
                return options
            entries.append(entry)
        if self.run is not None:
            self.run.compared.update(uuids)
        if step.mode == "check":
            step.checked += entries
            return self.plan.check(net, entries, options)
        self.resumed = True
        return self.plan.resume(net, entries, options)
