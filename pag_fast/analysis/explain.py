"""What a pipeline runs, layer by layer and call by call, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import PatchConfig
from ..fusion import Lean
from ..models.inputs import Size
from ..models.registry import controlnets, denoiser_name, uncompiled
from ..pipelines.description import PipelineDescription
from ..pipelines.registry import denoiser_names, host_of
from ..runtime.installation import Installation, PerturbedBranch, is_eager
from ..sharing.conditioning_cache import invariant_modules
from ..sharing.plan import BranchPlan
from ..sharing.unet_plan import plan_controlnet
from .flops import Cost, controlnet_cost, step_costs
from .published import meta_twin

_PIPELINES_SCALE = "the call's pag_scale and pag_adaptive_scale"


@dataclass(frozen=True)
class ModelCall:
    """Rows, in units of one branch, that a model call runs on."""

    model: str
    cfg: bool
    stock: int
    patched: str


@dataclass(frozen=True)
class Predicted:
    """FLOPs of a step for one image."""

    cfg: bool
    stock: int
    patched: int
    bound: int


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: attributes are the data, ``str()`` is the table.

    Attributes:
        layers: perturbed attention modules, or blocks, in execution order; empty for Self-Attention
            Guidance, which perturbs none.
        fork: the first of them, where the perturbed branch begins.
        perturbations: each perturbed branch: what sets it apart, where, and how strongly it guides.
        tree: where uncond, cond and perturbed part, or what the passes of a step are, in words.
        sites: modules whose rows are changed, with the levels they go through.
        calls: what each model call runs on.
        flops: predicted FLOPs of a step, stock, patched and lower bound; empty where unknown.
        schedule: the PAG scale from step to step, in words; empty where there is none.
        size, frames: ``(height, width)`` in pixels, and of a video the frames, the prediction is
            for.
        steps: denoiser calls so far, by how they ran.
        fallbacks: reasons why something ran unshared, and how often.
        once: modules that run once per call, as they see nothing but the conditioning.
        launches: what is left out of every step without changing its result, by model.
        source: where a choice of layers that nobody made comes from: a paper, an issue, or none.
        findings: what others have put on the models, and what comes of it.
    """

    pipeline: str
    denoiser: str
    is_patched: bool
    backend: str
    layers: tuple[str, ...]
    fork: str | None
    tree: tuple[str, ...]
    sites: tuple[str, ...]
    calls: tuple[ModelCall, ...]
    flops: tuple[Predicted, ...]
    size: tuple[int, int]
    schedule: str = _PIPELINES_SCALE
    steps: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    launches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    perturbations: tuple[str, ...] = ()
    frames: int = 1
    source: str = ""
    findings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts and numbers, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        state = (
            f"patched, backend {self.backend}" if self.is_patched else "not patched; if it were:"
        )
        lines = [f"{self.pipeline} · {self.denoiser} · {state}", ""]
        source = f", by default: {self.source}" if self.source else ""
        if self.layers:
            lines += [f"perturbed layers ({len(self.layers)}){source}", *_shorten(self.layers), ""]
            lines += ["perturbation", *[f"  {line}" for line in self.perturbations], ""]
        title = "branch tree" if self.layers else "passes of a step"
        lines += [title, *[f"  {line}" for line in self.tree], ""]
        rows = [(c.model, "on" if c.cfg else "off", str(c.stock), c.patched) for c in self.calls]
        lines += table(("model call", "CFG", "branches stock", "branches patched"), rows)
        if self.schedule:
            lines += ["", f"PAG scale: {self.schedule}"]
        if self.flops:
            lines += ["", f"TFLOPs per step, one sample of {Size(*self.size, self.frames)}"]
            lines += flops_table(
                [("on" if p.cfg else "off", Cost(p.stock, p.patched, p.bound)) for p in self.flops],
                "CFG",
            )
        if self.once:
            lines += ["", f"once per call: {_summary(self.once)}"]
        if self.launches:
            lines += ["", "fewer launches", *[f"  {line}" for line in self.launches]]
        if self.steps:
            lines += ["", "steps so far: " + ", ".join(f"{k} {v}" for k, v in self.steps.items())]
        for reason, times in self.fallbacks.items():
            lines.append(f"fallback ×{times}: {reason}")
        if self.findings:
            lines += ["", "others on the model", *[f"  {line}" for line in self.findings]]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    flops: bool = True,
) -> Explanation:
    """What ``pipe`` runs, patched or as it would be patched.

    Args:
        pipe: a pipeline that :func:`pag_fast.patch` takes.
        height, width, frames: what to predict FLOPs for; omitted, the pipeline's default size.
        flops: predict FLOPs too, by tracing the models' configurations on the meta device, which
            takes seconds.

    Raises:
        ValueError: a pipeline that cannot be patched.
    """
    from ..patching import applied_layers, check_pipeline
    from ..sag import is_sag
    from .sag import explain_sag

    check_pipeline(pipe)
    if is_sag(pipe):
        return explain_sag(pipe, size=(height, width))
    found = getattr(pipe, "_pag_fast", None)
    config = PatchConfig() if found is None else found.config
    model = uncompiled(getattr(pipe, denoiser_name(pipe)))
    layers = applied_layers(pipe)
    installed = Installation(model, layers, config)
    plan = installed.plan
    nets = list(controlnets(pipe.controlnet)) if getattr(pipe, "controlnet", None) else []
    size, host = Size.of(pipe).but(height, width, frames), host_of(pipe)
    sequential = host is not None and host.sequential
    notes = [
        f"{name} is perturbed in the same layers as {denoiser_names(pipe)[0]}"
        for name in denoiser_names(pipe)[1:]
    ]
    predicted = _predict(model, nets, layers, config, size, host, notes) if flops else ()
    return Explanation(
        pipeline=type(pipe).__name__,
        denoiser=type(model).__name__,
        is_patched=found is not None,
        backend=config.backend,
        layers=plan.order,
        fork=plan.fork,
        tree=_tree(plan, len(installed.branches), sequential),
        sites=tuple(str(site) for site in plan.sites),
        calls=tuple(_calls(type(model).__name__, plan, nets, len(installed.branches), sequential)),
        flops=predicted,
        size=(size.height, size.width),
        schedule=_PIPELINES_SCALE if config.schedule is None else str(config.schedule),
        steps={} if found is None else dict(found.steps),
        fallbacks={} if found is None else dict(found.fallbacks),
        once=tuple(_once(pipe, config)),
        launches=tuple(_launches(pipe, config, installed.same_input())),
        notes=tuple(notes),
        perturbations=tuple(map(_describe, installed.branches)),
        frames=size.frames,
        source=host.source if host is not None and tuple(layers) == host.layers else "",
    )


def _describe(branch: PerturbedBranch) -> str:
    layers, scale = branch.layers, branch.scale
    where = layers[0] if len(layers) == 1 else f"{len(layers)} layers"
    strength = "the call's pag_scale" if scale is None else f"scale {scale:g}"
    return f"{branch.perturbation.describe()}, in {where}, {strength}"


def _once(pipe: Any, config: PatchConfig) -> Iterator[str]:
    """Names of the modules that run once per call; a ControlNet's behind the name of its class."""
    for part in (denoiser_name(pipe), "controlnet"):
        model = getattr(pipe, part, None)
        for net in [] if model is None else controlnets(model):
            prefix = f"{type(net).__name__}." if part == "controlnet" else ""
            if config.cache_conditioning and is_eager(model, net):
                yield from (prefix + name for name in invariant_modules(net))


def _launches(pipe: Any, config: PatchConfig, perturbed: dict[str, int]) -> Iterator[str]:
    for part in (denoiser_name(pipe), "controlnet") if config.fewer_launches else ():
        model = getattr(pipe, part, None)
        for net in [] if model is None else controlnets(model):
            if is_eager(model, net):
                names = {} if part == "controlnet" else perturbed
                for line in Lean(net, names, traced=config.traces).summary():
                    yield f"{type(net).__name__}: {line}"


def _summary(names: Sequence[str]) -> str:
    pairs = [name for name in names if name.endswith((".to_k", ".to_v", ".to_kv"))]
    others = [name for name in names if name not in pairs]
    return ", ".join([*others, f"{len(pairs)} keys and values of text"] if pairs else others)


def _tree(plan: BranchPlan, branches: int, sequential: bool) -> tuple[str, ...]:
    perturbed = ["perturbed"] * branches
    apart = " | ".join(["uncond", "cond", *perturbed])
    if plan.reason:
        return (f"{apart} run apart: {plan.reason}",)
    if sequential:
        end = f"the end of {plan.begins}" if plan.begins else plan.fork
        return (
            f"cond = perturbed   until {end}",
            f"{' | '.join(['cond', *perturbed])}   from there on",
            "uncond             a call of its own",
        )
    lines = []
    if plan.merged_until:
        lines.append(f"uncond = cond = perturbed   until {plan.merged_until}")
    if plan.fork != plan.merged_until:
        end = f"the end of {plan.begins}" if plan.begins else plan.fork
        lines.append(f"uncond | cond = perturbed   until {end}")
    lines.append(f"{apart}   from there on")
    return tuple(lines)


def _calls(
    denoiser: str, plan: BranchPlan, nets: Sequence[Any], branches: int, sequential: bool
) -> Iterable[ModelCall]:
    for cfg in (True, False):
        together = cfg and not sequential
        prompts = 2 if together else 1
        full = prompts + branches
        path = [full] if plan.reason else [prompts, full]
        if plan.merged and together:
            path.insert(0, 1)
        if plan.fork and plan.fork == plan.merged_until and together:
            path = [1, full]
        yield ModelCall(denoiser, cfg, full, " → ".join(map(str, path)))
        if cfg and sequential:
            yield ModelCall(f"{denoiser}, uncond", cfg, 1, "1")
        for net in nets:
            merged = cfg and bool(plan_controlnet(net).merged_until)
            yield ModelCall(type(net).__name__, cfg, full, "1 → 2" if merged else str(prompts))


def _predict(
    model: Any,
    nets: Sequence[Any],
    layers: Any,
    config: PatchConfig,
    size: Size,
    host: PipelineDescription | None,
    notes: list[str],
) -> tuple[Predicted, ...]:
    try:
        twin, net_twins = meta_twin(model), [meta_twin(net) for net in nets]
        sequential = host is not None and host.sequential
        costs = step_costs(twin, layers, size.inputs(twin), sequential=sequential, config=config)
        predicted = []
        for cfg, cost in zip((True, False), costs, strict=True):
            for net in net_twins:
                cost = cost + controlnet_cost(net, size.inputs(net), cfg=cfg)
            predicted.append(Predicted(cfg, cost.stock, cost.patched, cost.bound))
    except Exception as error:
        # a prediction is a courtesy: a checkpoint it cannot rebuild must still be explained
        notes.append(f"no FLOP prediction for this model ({type(error).__name__}: {error})")
        return ()
    return tuple(predicted)


def _shorten(names: Sequence[str]) -> list[str]:
    if len(names) > 8:
        names = [*names[:4], f"… {len(names) - 6} more", *names[-2:]]
    return [f"  {name}" for name in names]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [line(header), rule, *map(line, rows)]


def flops_table(costs: Sequence[tuple[str, Cost]], first: str) -> list[str]:
    """The FLOP columns that ``explain`` and the ledger share."""
    return table(
        (first, "stock", "patched", "lower bound", "stock/patched", "over bound"),
        [
            (
                label,
                f"{cost.stock / 1e12:.3f}",
                f"{cost.patched / 1e12:.3f}",
                f"{cost.bound / 1e12:.3f}" if cost.bound else "–",
                f"{cost.speedup:.3f}×",
                f"{100 * (cost.patched / cost.bound - 1):.2f} %" if cost.bound else "–",
            )
            for label, cost in costs
        ],
    )
