"""The life of a step: the main pass is recorded, the perturbed pass resumes from the record.

ComfyUI asks a model for its predictions through three functions that may be wrapped:
``predict_noise`` (a step), ``calc_cond_batch`` (all conditionings at one point of a step) and
``apply_model`` (one batch of them, as memory allows). :class:`Sharing` wraps these three, and
``outer_sample`` (a whole sampling), without touching a class or a module: it records in the first
``calc_cond_batch`` of a step and resumes in the one that :meth:`Sharing.perturbed` makes.

Nothing is predicted: an entry of the conditioning resumes only if it was seen in this step's main
pass, once, whole, with the same inputs and the same patches. Otherwise its perturbed pass is
computed whole, which is slower and right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from . import control
from .report import Report

KEY = "pag_fast"


@dataclasses.dataclass
class Entry:
    """What one entry of the conditioning went through in the main pass of this step.

    Args:
        inputs: its rows of what the model was called with, by name.
        kept: what the denoiser's plan kept of it, by place. Tensors have this entry's rows only.
        control: the residuals of its ControlNets, as the model received them, if they are whole.
        spoiled: why it cannot be resumed, if it cannot.
    """

    inputs: dict[str, torch.Tensor]
    kept: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    control: control.Residuals | None = None
    spoiled: str | None = None


@dataclasses.dataclass
class Step:
    """One ``predict_noise``: from the main pass until the perturbed pass has resumed."""

    entries: dict[Hashable, Entry] = dataclasses.field(default_factory=dict)
    mode: str = "off"  # or "record", "resume"
    begun: bool = False
    x: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    patches: Any = None
    all_conds: bool = False


@dataclasses.dataclass
class Run:
    """One sampling: what its first guided step has shown holds for the others."""

    compared: bool = False
    wanted: set[Hashable] | None = None


class Plan(Protocol):
    """Where the perturbed pass leaves the main pass in one kind of denoiser."""

    def supports(self, net: torch.nn.Module) -> str | None:
        """Why nothing can be shared with ``net``; None if it can."""

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


def predicted(args: dict[str, Any], cond: Any, options: dict[str, Any]) -> torch.Tensor:
    """The prediction [B, C, ...] of ``cond`` at the point of a post-CFG function's ``args``."""
    model, x, sigma = args["model"], args["input"], args["sigma"]
    return comfy.samplers.calc_cond_batch(model, [cond], x, sigma, options)[0]


def denoiser(model: Any) -> torch.nn.Module:
    """The denoiser of a ``BaseModel``, without the wrapper of ``torch.compile``."""
    net = model.diffusion_model
    return getattr(net, "_orig_mod", net)


def _patches(model_options: dict[str, Any]) -> list[Any]:
    """Everything in the options that changes what a pass computes, to be compared by identity."""
    to = model_options.get("transformer_options", {})
    flat: list[Any] = [
        model_options.get("model_function_wrapper"),
        to.get("optimized_attention_override"),
    ]
    for name, patches in sorted(to.get("patches", {}).items()):
        flat += [name, *patches]
    for kind, replaced in sorted(to.get("patches_replace", {}).items()):
        flat.append(kind)
        for where in sorted(replaced, key=str):
            flat += [str(where), replaced[where]]
    return flat


def _same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x is y or (type(x) is str and x == y) for x, y in pairs)


def _rows(named: dict[str, Any], rows: slice, batch: int) -> dict[str, torch.Tensor]:
    """``rows`` of every tensor in ``named`` that has ``batch`` rows, and the others whole."""
    out: dict[str, torch.Tensor] = {}
    for name, value in named.items():
        values = value if isinstance(value, list | tuple) else [value]
        for i, tensor in enumerate(values):
            if isinstance(tensor, torch.Tensor):
                whole = tensor.ndim == 0 or tensor.shape[0] != batch
                out[f"{name}.{i}"] = tensor if whole else tensor[rows]
    return out


class Sharing:
    """Lets the perturbed pass of one patched model resume from its main pass.

    Args:
        plan: what to keep and to hand out, for one kind of denoiser.
        active: whether guidance acts at a noise level (sigma [B]); elsewhere nothing is kept.

    Attributes:
        report: says why something is computed whole.
    """

    def __init__(self, plan: Plan, active: Callable[[torch.Tensor], bool]) -> None:
        self.plan, self.active, self.report = plan, active, Report()
        self.run: Run | None = None
        self.step: Step | None = None

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
        step.x, step.sigma, step.patches = x, sigma, _patches(options)
        step.all_conds = len(conds) > 2
        step.mode = "record"
        try:
            return executor(model, conds, x, sigma, options)
        finally:
            step.mode = "off"

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
            inputs = _rows(named, where, x.shape[0])
            if self._compares():
                inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            entry = Entry(inputs, control=control.rows_of(residuals, where, x.shape[0]))
            step.entries[uuid] = entry
            new.append((entry, where))
        out = run(self.plan.record(net, new, options) if new else options)
        for entry, _ in new:
            if entry.spoiled is None and not self.plan.complete(net, entry):
                # a cache in between may have left the forward out
                entry.spoiled = "its main pass was not seen in its blocks"
        return out

    def _compares(self) -> bool:
        return self.run is None or not self.run.compared

    # -- the perturbed pass -----------------------------------------------------------------

    def perturbed(self, args: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
        """The perturbed prediction of cond [B, C, ...], resumed where the step allows it.

        Args:
            args: what ComfyUI hands to a post-CFG function.
            options: ``args["model_options"]`` with the perturbation in its patches.
        """
        cond = args["cond"]
        with self._resuming(args) as step:
            if step is not None:
                cond = control.stand_ins(cond, step.entries, step.x.shape[0])
            return predicted(args, cond, options)

    @contextmanager
    def _resuming(self, args: dict[str, Any]) -> Iterator[Step | None]:
        step = self.step
        reason = self._stale(step, args)
        if step is None or reason is not None:
            if step is not None and step.x is not None:
                self.report.whole(type(denoiser(args["model"])).__name__, str(reason))
            yield None
            return
        if self.run is not None:
            self.run.wanted = {entry["uuid"] for entry in args["cond"]}
        step.mode = "resume"
        try:
            yield step
            if self.run is not None:
                self.run.compared = True
        finally:
            step.mode = "off"
            step.entries = {}

    def _stale(self, step: Step | None, args: dict[str, Any]) -> str | None:
        """Why the record of this step does not belong to what is asked now."""
        if step is None or step.x is None:
            return "nothing was recorded"
        for before, now in ((step.x, args["input"]), (step.sigma, args["sigma"])):
            if before is not now and not torch.equal(before, now):
                return "it is asked at another point than the main pass"
        if not _same(step.patches, _patches(args["model_options"])):
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
            now = _rows(named, slice(i * rows, (i + 1) * rows), x.shape[0])
            reason = "its conditioning was not in the main pass" if entry is None else entry.spoiled
            if entry is not None and reason is None and not self._equal(entry.inputs, now):
                reason = "it is called with other inputs than the main pass"
            if entry is None or reason is not None:
                self.report.whole(type(net).__name__, str(reason))
                return options
            entries.append(entry)
        return self.plan.resume(net, entries, options)

    def _equal(self, before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> bool:
        """Shapes in every step; values in the first, because comparing them waits for the GPU."""
        if before.keys() != now.keys():
            return False
        compares = self._compares()
        return all(
            tensor.shape == now[name].shape and (not compares or torch.equal(tensor, now[name]))
            for name, tensor in before.items()
        )
