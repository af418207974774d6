"""Whether a patch changes the picture: one call stock and one patched, compared.

Neither run touches what the pipeline has: schedulers are copies, attributes come back, and the
random numbers are those of a seed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import math
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..config import PatchConfig
from ..models.registry import denoiser_name, uncompiled
from ..patching import check_pipeline, patched
from ..pipelines.registry import denoiser_names, described_with
from ..settings.layers import Layers
from ..version import __version__
from .explain import explain
from .explanation import Explanation

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""The relative difference that rounding may make in the few steps of :func:`verify`."""

_STEPS = 4
_DIFFUSERS, _ITSELF = "diffusers' own pipeline", "the same patch with nothing shared"
_UNSHARED: dict[str, Any] = {
    "share_branches": False,
    "cache_conditioning": False,
    "fewer_launches": False,
    "compile": False,
    "backend": "torch",
}
# what diffusers' own PAG cannot do: such a patch is compared with itself, unshared
_CHANGES = ("perturbation", "branches", "schedule", "rescale_mode", "reuse")


@dataclass(frozen=True)
class Verification:
    """The answer of :func:`verify`: attributes are the data, ``str()`` is the report.

    Attributes:
        reference: what the patched call was compared with.
        largest: the largest difference of two numbers of the outputs.
        relative: the norm of the difference over the norm of the reference.
        psnr: in dB, of outputs that nobody has rounded, with the reference's largest magnitude as
            the peak; infinite for equal ones.
        dtype: of the denoiser, which decides on ``bound``, what rounding may make of ``relative``.
        steps: denoiser calls of the patched run, by how they ran.
        fallbacks: reasons why something ran unshared, and how often.
        explanation: what was patched, and how.
        versions: of everything that computes.
        from_unshared: where diffusers' output is another one: ``relative`` of the same patch with
            nothing shared. It tells what is shared wrongly from what is computed in another way,
            such as a defect of diffusers that a patch mends.
    """

    pipeline: str
    reference: str
    largest: float
    relative: float
    psnr: float
    dtype: str
    device: str
    bound: float
    shape: tuple[int, ...]
    steps: dict[str, int]
    fallbacks: dict[str, int]
    explanation: Explanation
    versions: dict[str, str]
    from_unshared: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the difference is no more than rounding; never so where a number is not one."""
        return self.relative <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts and numbers, ready for JSON."""
        return {**asdict(self), "explanation": self.explanation.as_dict(), "ok": self.ok}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        verdict = "equal but for rounding" if self.ok else "DIFFERS"
        sign = "≤" if self.ok else ">"
        if not math.isfinite(self.relative):
            verdict, sign = "DIFFERS, or is not finite", "not ≤"
        lines = [
            f"{self.pipeline}: {verdict}",
            f"  relative difference {self.relative:.2e} {sign} {self.bound:.0e}, the bound for "
            f"{self.dtype}",
            f"  largest difference {self.largest:.2e}, {self.psnr:.1f} dB, shape {self.shape}",
            f"  compared with {self.reference}",
            *self._sharing(),
            "  steps: " + (", ".join(f"{k} {v}" for k, v in self.steps.items()) or "none patched"),
            *[f"  fallback ×{times}: {reason}" for reason, times in self.fallbacks.items()],
            "",
            str(self.explanation),
            "",
            f"device {self.device}, " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]
        return "\n".join(lines)

    def _sharing(self) -> list[str]:
        if self.from_unshared is None:
            return []
        shared = self.from_unshared <= self.bound
        said = "sharing is not the reason" if shared else "sharing is the reason"
        return [f"  from {_ITSELF} it differs by {self.from_unshared:.2e}: {said}"]


def verify(
    pipe: Any, *, layers: Layers | None = None, config: PatchConfig | None = None, **call: Any
) -> Verification:
    """Run a call of ``pipe`` stock and patched, and compare what comes out.

    A pipeline that is patched is run as it is; one that is not is patched for this call. Stock is
    diffusers' own pipeline. Where that cannot do what the patch does (a pipeline without PAG, or
    another perturbation, branches, a schedule, reuse or a rescale mode) it is the same patch with
    nothing shared, joined, kept or compiled. The pipeline and its patch are afterwards as they
    were, also where a run raises.

    Args:
        layers: patch with these, also where there is a patch already.
        config: likewise.
        **call: arguments of the pipeline. If omitted, ``num_inference_steps`` is 4,
            ``output_type`` is ``"latent"``, and ``generator`` one with the seed 0. A generator that
            is given is copied for either run and left as it is.

    Raises:
        ValueError: a pipeline that cannot be patched.
    """
    check_pipeline(pipe)
    if config is not None and not isinstance(config, PatchConfig):
        raise ValueError(f"config must be a PatchConfig; got {config!r}.")
    chosen = call.pop("pag_applied_layers", None)  # of this call alone: stock does not know it
    layers = chosen if layers is None else layers
    call = _call(pipe, call)
    denoiser = uncompiled(getattr(pipe, denoiser_name(pipe)))
    with _untouched(pipe):
        found = getattr(pipe, "_pag_fast", None)
        if config is None:
            config = PatchConfig() if found is None else found.config
        if layers is not None:
            config = replace(config, layers=layers)
        as_it_is = found is not None and config is found.config
        with nullcontext() if as_it_is else patched(pipe, config=config):
            ours = pipe._pag_fast
            before = Counter(ours.steps), Counter(ours.fallbacks)
            out = _run(pipe, call)
            steps, fallbacks = ours.steps - before[0], ours.fallbacks - before[1]
            explanation = explain(pipe, flops=False)
        reference, stock = _stock(pipe, config, explanation, call)
        found_by = _compare(out, stock)
        bound = BOUNDS.get(denoiser.dtype, BOUNDS[torch.bfloat16])
        from_unshared = None
        differs = not found_by["relative"] <= bound
        if differs and reference == _DIFFUSERS and explanation.layers:
            from_unshared = _compare(out, _unshared(pipe, config, call))["relative"]
    return Verification(
        pipeline=type(pipe).__name__,
        reference=reference,
        **found_by,
        from_unshared=from_unshared,
        dtype=str(denoiser.dtype).removeprefix("torch."),
        device=str(denoiser.device),
        bound=bound,
        shape=tuple(out.shape),
        steps=dict(steps),
        fallbacks=dict(fallbacks),
        explanation=replace(explanation, steps={}, fallbacks={}),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of everything that computes, for a report."""
    found = {"pag_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---- the two runs ----


def _stock(
    pipe: Any, config: PatchConfig, explanation: Explanation, call: Mapping[str, Any]
) -> tuple[str, torch.Tensor]:
    """What to compare with, in words, and its output."""
    default = PatchConfig()
    changes = [name for name in _CHANGES if getattr(config, name) != getattr(default, name)]
    # layers may make another pipeline of it than the patch that it has, or none, by now
    perturbs = config.layers is not None or config.branches is not None
    kind = described_with(pipe, perturbs=perturbs).kind
    if kind != "injected" and not (kind == "pag" and changes):
        twin = _twin(pipe)
        if kind == "pag":
            # by their full names: stock takes neither short names nor numbers
            twin.pag_applied_layers = [f"^{re.escape(name)}$" for name in explanation.layers]
        try:
            with _processors_kept(pipe):
                return _DIFFUSERS, _run(twin, call)
        except Exception as error:  # it has defects that a patch mends; ARCHITECTURE.md lists them
            why = f"diffusers' own fails with {type(error).__name__}: {error}"
    elif kind != "injected":
        why = f"the patch has {', '.join(changes)}"
    else:
        why = "the pipeline has no PAG itself"
    return f"{_ITSELF}, as {why}", _unshared(pipe, config, call)


def _unshared(pipe: Any, config: PatchConfig, call: Mapping[str, Any]) -> torch.Tensor:
    with patched(pipe, config=replace(config, **_UNSHARED)):
        return _run(pipe, call)


def _twin(pipe: Any) -> Any:
    """The pipeline as diffusers made it: another object, with the same models."""
    found = getattr(pipe, "_pag_fast", None)
    cls: Any = type(pipe) if found is None else found.original_class
    twin = object.__new__(cls)
    twin.__dict__.update({k: v for k, v in vars(pipe).items() if k != "_pag_fast"})
    return twin


def _run(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """The output of one call as one tensor on the CPU, with random numbers of its own."""
    vars(pipe)["scheduler"] = copy.deepcopy(pipe.scheduler)
    given = torch.utils._pytree.tree_map(_copied, dict(call))
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        out = pipe(**given)
    if isinstance(out, torch.Tensor | tuple | list):  # of a class that nobody has described
        return _tensor(out if isinstance(out, torch.Tensor) else out[0])
    values = list(out.values()) if isinstance(out, Mapping) else vars(out).values()
    return _tensor(next(iter(values)))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensor(output: Any) -> torch.Tensor:
    """Latents, arrays or pictures, and lists of them, as one tensor."""
    if isinstance(output, torch.Tensor):
        return output.detach().cpu()
    if isinstance(output, list | tuple):
        return torch.stack([_tensor(item) for item in output])
    import numpy

    array = torch.from_numpy(numpy.array(output))
    return array.double() / 255 if array.dtype == torch.uint8 else array


def _compare(out: torch.Tensor, stock: torch.Tensor) -> dict[str, float]:
    if out.shape != stock.shape:
        raise ValueError(
            f"The patched call returned {tuple(out.shape)} and stock {tuple(stock.shape)}: these "
            "are not outputs of the same call."
        )
    a, b = out.double(), stock.double()
    error, norm, peak = (a - b).norm().item(), b.norm().item(), b.abs().max().item()
    relative = error / norm if norm else (0.0 if error == 0.0 else math.inf)
    mean = error**2 / max(a.numel(), 1)
    psnr = math.inf if mean == 0.0 else 10.0 * math.log10(peak**2 / mean) if peak else -math.inf
    return {"largest": (a - b).abs().max().item(), "relative": relative, "psnr": psnr}


def _call(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The call with what makes it short and repeatable, as far as the pipeline takes that."""
    ours: dict[str, Any] = {"output_type": "latent", "return_dict": True}
    if not {"timesteps", "sigmas"} & call.keys():
        ours["num_inference_steps"] = _STEPS
    if call.get("generator") is None:
        ours["generator"] = torch.Generator("cpu").manual_seed(0)
    parameters = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    given = {name: x for name, x in ours.items() if takes_all or name in parameters}
    last: dict[str, Any] = {
        name: given[name] for name in ("generator", "return_dict") if name in given
    }
    return {**given, **call, **last}


# ---- nothing is left behind ----


@contextmanager
def _processors_kept(pipe: Any) -> Iterator[None]:
    """Stock leaves its processors on the model where its call raises."""
    models = [uncompiled(getattr(pipe, name)) for name in denoiser_names(pipe)]
    layers = [m for model in models for m in model.modules() if hasattr(m, "set_processor")]
    before = [(layer, layer.processor) for layer in layers]
    try:
        yield
    finally:
        for layer, processor in before:
            if layer.processor is not processor:
                layer.set_processor(processor)


@contextmanager
def _untouched(pipe: Any) -> Iterator[None]:
    """The pipeline's attributes and its patch's counts are afterwards what they were."""
    attributes, cls = dict(vars(pipe)), type(pipe)
    found = attributes.get("_pag_fast")
    counts = None if found is None else (Counter(found.steps), Counter(found.fallbacks))
    try:
        yield
    finally:
        pipe.__class__ = cls
        vars(pipe).clear()
        vars(pipe).update(attributes)
        if found is not None and counts is not None:
            for counter, before in zip((found.steps, found.fallbacks), counts, strict=True):
                counter.clear()
                counter.update(before)
