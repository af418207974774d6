"""What a pipeline runs, layer by layer and call by call, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..config import PatchConfig
from ..fusion import Fusion
from ..models.inputs import Inputs, Size, given_sizes
from ..models.registry import (
    controlnets,
    denoiser_name,
    family_of,
    fusable_processors,
    is_derived,
    uncompiled,
)
from ..pipelines.description import PipelineDescription
from ..pipelines.registry import denoiser_names, describe_pipeline
from ..runtime.compatibility import explain_lines, look, own_package
from ..runtime.installation import Installation, is_eager
from ..runtime.perturbed_branches import PerturbedBranch
from ..settings.checks import switch
from ..sharing.conditioning_cache import invariant_modules
from ..sharing.plan import BranchPlan
from ..sharing.unet_plan import plan_controlnet
from .explanation import PIPELINES_SCALE, Explanation, ModelCall, Predicted
from .flops import controlnet_cost, step_costs
from .published import meta_twin
from .ranks import RankCost, placed, rank_costs
from .stock import explain_stock, in_words


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
        height: of the picture to predict FLOPs for, in pixels; omitted, the pipeline's default.
        width: likewise.
        frames: likewise, of a video.
        flops: predict FLOPs too, by tracing the models' configurations on the meta device, which
            takes seconds.

    Raises:
        ValueError: a pipeline that cannot be patched.
    """
    from ..patching import applied_layers, check_pipeline
    from ..sag import is_sag
    from .sag import explain_sag

    check_pipeline(pipe)
    switch("flops", flops)
    if is_sag(pipe):
        return explain_sag(pipe, size=given_sizes(height, width, frames, video=False))
    if describe_pipeline(pipe).kind == "stock":
        return explain_stock(pipe, size=given_sizes(height, width, frames, video=True))
    found = getattr(pipe, "_pag_fast", None)
    config = PatchConfig() if found is None else found.config
    model = uncompiled(getattr(pipe, denoiser_name(pipe)))
    layers = applied_layers(pipe)
    installed = Installation(model, layers, config)
    plan = installed.plan
    nets = list(controlnets(pipe.controlnet)) if getattr(pipe, "controlnet", None) else []
    size, described = Size.of(pipe).but(height, width, frames), describe_pipeline(pipe)
    sequential, others = _sequential(described, found), described.others
    notes = [
        f"{name} is perturbed in the same layers as {denoiser_names(pipe)[0]}"
        for name in denoiser_names(pipe)[1:]
    ]
    notes += _derived(pipe, described)
    notes += _graphs(found)
    if described.stock_guidance is not None:
        notes.append(in_words(described.stock_guidance))
    predicted: tuple[Predicted, ...] = ()
    counted: list[tuple[Any, Inputs]] = []
    if flops:
        predicted, counted = _predict(
            model, nets, layers, config, size, described, notes, sequential
        )
    return Explanation(
        pipeline=type(pipe).__name__,
        denoiser=type(model).__name__,
        is_patched=found is not None,
        backend=config.backend,
        layers=plan.order,
        fork=plan.fork,
        tree=_tree(plan, len(installed.branches), sequential, others),
        sites=tuple(str(site) for site in plan.sites),
        calls=tuple(
            _calls(type(model).__name__, plan, nets, len(installed.branches), sequential, others)
        ),
        flops=predicted,
        size=(size.height, size.width),
        schedule=PIPELINES_SCALE if config.schedule is None else str(config.schedule),
        steps={} if found is None else dict(found.steps),
        fallbacks={} if found is None else dict(found.fallbacks),
        once=tuple(_once(pipe, config)),
        launches=tuple(_launches(pipe, config, installed.same_input())),
        findings=tuple(_findings(pipe, (*denoiser_names(pipe), "controlnet"), sequential)),
        notes=tuple(notes),
        perturbations=tuple(map(_describe, installed.branches)),
        frames=size.frames,
        ranks=tuple(_ranks(counted, layers, config, described, len(installed.branches))),
        source=described.source if _is_choice_of(described, layers) else "",
    )


def _sequential(described: PipelineDescription, found: Any) -> bool:
    """Whether uncond is a call of its own, as described or as the latest call has shown."""
    seen = getattr(found, "seen_of_loop", {}).get("branches", "")
    return described.sequential and not seen.startswith("together")


def _derived(pipe: Any, described: PipelineDescription) -> Iterator[str]:
    """What was not written down but seen."""
    if not described.is_written:
        yield (
            f"nobody has described {described.name}: which forwards and rows are cond's is seen in "
            "its calls, and guidance is taken for linear"
        )
    for name in denoiser_names(pipe):
        found = family_of(uncompiled(getattr(pipe, name)))
        if not found.is_derived:
            continue
        if found.traced.trace is None:
            yield f"the description of {found.name} is derived in its first forward"
            continue
        yield f"the description of {found.name} is derived from a forward; FLOPs are of its size"
        for layer, why in found.traced.trace.left_out.items():
            yield f"{layer} cannot be perturbed: {why}"


def _is_choice_of(described: PipelineDescription, layers: Any) -> bool:
    """Whether these are the layers that we have chosen for a pipeline without PAG."""
    return described.kind == "injected" and tuple(layers) == described.layers


def _graphs(found: Any) -> Iterator[str]:
    """What graphs there were in the calls so far."""
    capture = getattr(found, "capture", None)
    if capture is not None:
        yield f"graphs of forwards: {capture.bytes / 2**20:.0f} MiB held while a call runs"


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
            if config.cache_conditioning and is_eager(model, net) and not is_derived(net):
                yield from (prefix + name for name in invariant_modules(net))


def _launches(pipe: Any, config: PatchConfig, perturbed: dict[str, int]) -> Iterator[str]:
    for part in (denoiser_name(pipe), "controlnet") if config.fewer_launches else ():
        model = getattr(pipe, part, None)
        for net in [] if model is None else controlnets(model):
            if is_eager(model, net) and not is_derived(net):
                names = {} if part == "controlnet" else perturbed
                for line in _fusion(pipe, net, names, config).summary():
                    yield f"{type(net).__name__}: {line}"


def _fusion(pipe: Any, net: Any, names: dict[str, int], config: PatchConfig) -> Fusion:
    """What ran in the latest call of a patched pipeline, or would run."""
    ran = getattr(getattr(pipe, "_pag_fast", None), "fusion_of", lambda _: None)(net)
    if ran is not None:
        return ran
    return Fusion(net, names, traced=config.traces, fusable=fusable_processors(net))


def _findings(pipe: Any, parts: Sequence[str], passes_apart: bool) -> Iterator[str]:
    """What others have put on the models, and what pag_fast does about it."""
    for part in parts:
        model = getattr(pipe, part, None)
        for net in [] if model is None else controlnets(model):
            with torch.no_grad():  # as pipelines run their models
                found = look(net, passes_apart=passes_apart, own=own_package(net))
            for line in explain_lines(found):
                yield f"{type(net).__name__}: {line}"


def _tree(
    plan: BranchPlan, branches: int, sequential: bool, others: tuple[str, ...]
) -> tuple[str, ...]:
    perturbed = ["perturbed"] * branches
    apart = " | ".join([*others, "cond", *perturbed])
    if plan.reason:
        return (f"{apart} run apart: {plan.reason}",)
    if sequential:
        end = f"the end of {plan.begins}" if plan.begins else plan.fork
        return (
            f"cond = perturbed   until {end}",
            f"{' | '.join(['cond', *perturbed])}   from there on",
            "uncond             a call of its own",
        )
    lines, merged = [], plan.merged_until if len(others) == 1 else ""
    if merged:
        lines.append(f"uncond = cond = perturbed   until {plan.merged_until}")
    if plan.fork != merged:
        end = f"the end of {plan.begins}" if plan.begins else plan.fork
        lines.append(f"{' | '.join([*others, 'cond'])} = perturbed   until {end}")
    lines.append(f"{apart}   from there on")
    return tuple(lines)


def _calls(
    denoiser: str,
    plan: BranchPlan,
    nets: Sequence[Any],
    branches: int,
    sequential: bool,
    others: tuple[str, ...],
) -> Iterable[ModelCall]:
    for cfg in (True, False) if others else (False,):
        together = cfg and not sequential
        prompts = 1 + len(others) if together else 1
        full = prompts + branches
        path = [full] if plan.reason else [prompts, full]
        merges = together and len(others) == 1
        if plan.merged and merges:
            path.insert(0, 1)
        if plan.fork and plan.fork == plan.merged_until and merges:
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
    described: PipelineDescription,
    notes: list[str],
    sequential: bool,
) -> tuple[tuple[Predicted, ...], list[tuple[Any, Inputs]]]:
    """FLOPs of a step, and what was counted: twins of the denoiser and its ControlNets."""
    if len(described.others) > 1:
        notes.append("no FLOP prediction for guidance with two scales")
        return (), []
    try:
        twins = [meta_twin(part) for part in (model, *nets)]
        counted = [(twin, size.inputs(twin)) for twin in twins]
        twin, inputs = counted[0]
        costs = step_costs(twin, layers, inputs, sequential=sequential, config=config)
        predicted = []
        for cfg, cost in zip((True, False), costs, strict=True):
            if cfg and not described.others:
                continue
            for net, its in counted[1:]:
                cost = cost + controlnet_cost(net, its, cfg=cfg and not sequential)
            predicted.append(Predicted(cfg, cost.stock, cost.patched, cost.bound))
    except Exception as error:
        # a prediction is a courtesy: a checkpoint it cannot rebuild must still be explained
        why = (str(error).splitlines() or [""])[0]
        notes.append(f"no FLOP prediction for this model ({type(error).__name__}: {why})")
        return (), []
    return tuple(predicted), counted


def _ranks(
    counted: Sequence[tuple[Any, Inputs]],
    layers: Any,
    config: PatchConfig,
    described: PipelineDescription,
    branches: int,
) -> Iterator[RankCost]:
    """What every rank runs, where there are several; ``counted`` as :func:`_predict` says."""
    if config.mesh is None:
        return
    world = config.mesh.size()
    for cfg in (True, False) if described.others else (False,):
        if not counted:
            yield from placed(world, described.others, branches, cfg=cfg)
            continue
        twin, inputs = counted[0]
        yield from rank_costs(
            twin, layers, inputs, size=world, cfg=cfg, config=config, nets=counted[1:]
        )
