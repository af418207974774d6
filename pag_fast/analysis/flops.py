"""Counting FLOPs on the meta device: stock and patched; the least is in ``lower_bound.py``.

Nothing is run on real data: full-size models are built without weights and traced once per variant,
which takes seconds and gives the same integers every time. Matrix products, convolutions and
attention count, 2 FLOPs per multiply-add, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..config import PatchConfig
from ..fusion import Fusion
from ..models.inputs import Inputs
from ..models.layer_names import self_attentions
from ..models.registry import family_of, fusable_processors
from ..parallel.placement import slabs_of
from ..perturbations import Identity
from ..runtime.access.hooked_forward import forward_entries
from ..runtime.access.instance_patch import InstancePatch, as_put_on
from ..runtime.installation import Installation
from ..runtime.perturbed_branches import perturbed_branches
from ..sharing.arguments import latents_of
from ..sharing.conditioning_cache import invariants
from ..sharing.rows import BranchState
from ..sharing.threads import HERE
from ..sharing.unet_plan import plan_controlnet
from .counter import FlopCounter
from .lower_bound import Traced, lower_bound, row_flops, trace


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step for one image: as diffusers runs it, as patched, and the lower bound.

    Diffusers' pipelines know the identity on one branch alone. For everything else ``stock`` is
    every branch in full, and ``bound`` is 0: none is derived.
    """

    stock: int
    patched: int
    bound: int

    @property
    def speedup(self) -> float:
        return self.stock / self.patched

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.stock + other.stock,
            self.patched + other.patched,
            self.bound + other.bound if self.bound and other.bound else 0,
        )


def count(model: Any, call: dict[str, Any]) -> int:
    """FLOPs of ``model(**call)``."""
    with torch.no_grad(), FlopCounter() as counter:
        model(**call, return_dict=False)
    return counter.total


@contextmanager
def processors(model: Any, chosen: dict[str, Any]) -> Iterator[None]:
    """``model`` with the given processor on each named attention, restored afterwards."""
    modules = dict(model.named_modules())
    before = {name: modules[name].processor for name in chosen}
    try:
        for name, processor in chosen.items():
            modules[name].set_processor(processor)
        yield
    finally:
        for name, processor in before.items():
            modules[name].set_processor(processor)


@contextmanager
def stock_step(model: Any, layers: Any, *, cfg: bool) -> Iterator[int]:
    """``model`` with diffusers' own PAG processors; yields the rows of a step for one image.

    Where diffusers has none, PAG costs what an unmodified model does on one more branch.
    """
    import diffusers.models.attention_processor as stock

    pair = family_of(model).stock_processors
    if pair is None:
        yield 3 if cfg else 2
        return
    processor = getattr(stock, pair[0 if cfg else 1])()
    found = Installation(model, layers, PatchConfig()).attentions
    with processors(model, dict.fromkeys(found, processor)):
        yield 3 if cfg else 2


@contextmanager
def patched_step(
    model: Any,
    layers: Any,
    *,
    cfg: bool,
    config: PatchConfig,
    eager: bool = False,
    mine: Sequence[str] | None = None,
) -> Iterator[tuple[BranchState, int]]:
    """``model`` as while a patched pipeline runs; yields its state and the rows of a step.

    ``mine`` are the branches of one rank, where there are several. With ``eager``, what depends on
    the conditioning alone is kept from one forward to the next, and launches are left out;
    ``state.step`` has to be another number in each.
    """
    installation = Installation(model, layers, config, eager=eager)
    plan = installation.plan
    prompts = 2 if cfg else 1
    full = prompts + len(installation.branches)
    shared = full if plan.reason else prompts
    merged = 1 if plan.merged and shared == 2 else shared
    installation.state.slabs, rows = (merged, shared, full), full
    if mine is not None:
        installation.state.slabs, rows = slabs_of((merged, shared, full), mine), len(mine)

    def prepare(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        installation.prepare(args[0] if args else latents_of(kwargs), 0)

    handle = model.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        with torch.no_grad():  # as pipelines run: weights that need gradients are apart
            patch = installation.patch(fused=True)
        with as_in_a_forward(patch, installation.state):
            yield installation.state, rows
    finally:
        handle.remove()


@contextmanager
def as_in_a_forward(patch: InstancePatch, state: BranchState) -> Iterator[None]:
    """A model as it is while a patched pipeline runs it in this thread."""
    state.thread = HERE.me
    try:
        with as_put_on(patch):
            yield
    finally:
        state.thread = None


@contextmanager
def controlnet_step(
    model: Any, *, cfg: bool, eager: bool = False
) -> Iterator[tuple[BranchState, int]]:
    """As :func:`patched_step` for a ControlNet, which never runs on the perturbed rows."""
    plan, state = plan_controlnet(model), BranchState()
    rows = 2 if cfg else 1
    state.slabs = (1, rows, rows)
    kept = invariants(model, plan, state) if eager else {}
    entries = forward_entries(state, plan.hooks(state, without=kept))
    entries += [(vars(x.module), "forward", x) for x in kept.values()]
    if eager:
        fusion = Fusion(model, traced=False, state=state, fusable=fusable_processors(model))
        with torch.no_grad():
            fusion.refresh()
        entries += fusion.entries
    with as_in_a_forward(InstancePatch(entries), state):
        yield state, rows


def stock_flops(model: Any, layers: Any, inputs: Inputs, *, cfg: bool) -> int:
    """FLOPs of a step as diffusers runs it: every branch in full, its own PAG processors."""
    with stock_step(model, layers, cfg=cfg) as rows:
        return count(model, inputs(rows))


def patched_flops(
    model: Any,
    layers: Any,
    inputs: Inputs,
    *,
    cfg: bool,
    config: PatchConfig,
    mine: Sequence[str] | None = None,
) -> int:
    """FLOPs of a step as a patched pipeline runs it, the first of a call.

    ``mine`` are the branches of one rank, where there are several.
    """
    with patched_step(model, layers, cfg=cfg, config=config, mine=mine) as (state, rows):
        call = inputs(rows)
        described = family_of(model)
        if described.traced is not None and described.traced.example is not None:
            state.tokens = described.traced.example[2]
        elif described.tokens is not None:
            # rows of one size, whose prompts are of one length
            runs = described.tokens(model, call)[:1]
            state.mark_runs(self_attentions(model), runs, latents_of(call).device)
        sequence = described.sequence
        if sequence is not None:
            state.num_contexts, state.num_image = sequence(model, call)
        return count(model, call)


def denoiser_cost(
    model: Any,
    layers: Any,
    inputs: Inputs,
    *,
    cfg: bool,
    config: PatchConfig | None = None,
    traced: Sequence[Traced] | None = None,
) -> Cost:
    """What one denoiser call costs with PAG on ``layers``; ``traced`` is its trace, if known."""
    config = config or PatchConfig()
    branches = perturbed_branches(model, layers, config)
    patched = patched_flops(model, layers, inputs, cfg=cfg, config=config)
    traced = traced or trace(model, inputs)
    several = len(branches) > 1 or not isinstance(branches[0].perturbation, Identity)
    # of a derived model it is not known what the least is
    if several or family_of(model).is_derived:
        return Cost(((2 if cfg else 1) + len(branches)) * row_flops(traced), patched, 0)
    layers = [f"^{re.escape(name)}$" for name in branches[0].layers]
    if family_of(model).stock_processors is None:
        stock = (3 if cfg else 2) * row_flops(traced)
    else:
        stock = stock_flops(model, layers, inputs, cfg=cfg)
    return Cost(stock, patched, lower_bound(model, traced, layers, inputs, cfg=cfg))


def step_costs(
    model: Any,
    layers: Any,
    inputs: Inputs,
    *,
    sequential: bool,
    cfg: Sequence[bool] = (True, False),
    config: PatchConfig | None = None,
) -> list[Cost]:
    """What the denoiser costs in a step with PAG on ``layers``, for each value of ``cfg``.

    ``sequential``: CFG's uncond is a call of its own, which shares nothing with cond's.
    """
    traced, alone = trace(model, inputs), None
    row = row_flops(traced)
    costs = []
    for both in cfg:
        if both and not sequential:
            cost = denoiser_cost(model, layers, inputs, cfg=True, config=config, traced=traced)
        else:
            alone = alone or denoiser_cost(
                model, layers, inputs, cfg=False, config=config, traced=traced
            )
            cost = alone + Cost(row, row, row) if both else alone
        costs.append(cost)
    return costs


def controlnet_cost(model: Any, inputs: Inputs, *, cfg: bool) -> Cost:
    """What one ControlNet call costs in a PAG pipeline: stock runs it on the perturbed rows too."""
    with controlnet_step(model, cfg=cfg) as (_, rows):
        patched = count(model, inputs(rows))
    bound = lower_bound(model, trace(model, inputs), (), inputs, cfg=cfg)
    return Cost(count(model, inputs(3 if cfg else 2)), patched, bound)
