"""Counting FLOPs on the meta device: stock, patched, and the least that the branches allow.

Nothing is run on real data: full-size models are built without weights and traced once per variant,
which takes seconds and gives the same integers every time. Matrix products, convolutions and
attention count, 2 FLOPs per multiply-add, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .branches.invariant import invariants
from .branches.plan import install
from .branches.rows import BranchState
from .branches.unet import plan_controlnet
from .config import PatchConfig
from .families import family_of
from .installation import Installation
from .layers import self_attentions
from .lean import Lean

Inputs = Callable[[int], dict[str, Any]]
"""Forward arguments of a model for a number of rows."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step for one image: as diffusers runs it, as patched, and the lower bound."""

    stock: int
    patched: int
    bound: int

    @property
    def speedup(self) -> float:
        return self.stock / self.patched

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.stock + other.stock, self.patched + other.patched, self.bound + other.bound
        )


@dataclass(frozen=True)
class Traced:
    """FLOPs of one module in a forward pass of one row, its children not included."""

    name: str
    flops: int


def count(model: Any, call: dict[str, Any]) -> int:
    """FLOPs of ``model(**call)``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**call, return_dict=False)
    return counter.get_total_flops()


def trace(model: Any, inputs: Inputs) -> list[Traced]:
    """FLOPs of every module for one row, in the order in which the modules first compute."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs(1), return_dict=False)
    root = type(model).__name__
    totals = {
        name.removeprefix(root).lstrip("."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name != "Global"
    }
    own = dict(totals)
    for name, flops in totals.items():
        if name:
            own[name.rpartition(".")[0]] = own.get(name.rpartition(".")[0], 0) - flops
    # containers such as ModuleList are never called: what their children did belongs further up
    known = {name: flops for name, flops in own.items() if name in totals}
    for name in [n for n in own if n not in totals]:
        parent = name
        while parent and parent not in totals:
            parent = parent.rpartition(".")[0]
        known[parent] = known.get(parent, 0) + own[name]
    return [Traced(name, flops) for name, flops in known.items() if flops]


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
    model: Any, layers: Any, *, cfg: bool, config: PatchConfig, eager: bool = False
) -> Iterator[tuple[BranchState, int]]:
    """``model`` as while a patched pipeline runs; yields its state and the rows of a step.

    With ``eager``, what depends on the conditioning alone is kept from one forward to the next, and
    launches are left out; ``state.step`` has to be another number in each.
    """
    installation = Installation(model, layers, config, eager=eager)
    plan = installation.plan
    full = 3 if cfg else 2
    shared = full if plan.reason else full - 1
    merged = 1 if plan.merged and shared == 2 else shared
    installation.state.slabs = (merged, shared, full)
    with ExitStack() as stack:
        for handle in install(installation.hooks):
            stack.callback(handle.remove)
        for invariant in installation.invariants.values():
            stack.callback(invariant.install())
        stack.enter_context(processors(model, dict(installation.processors)))
        for undo in installation.lean.install(installation.state) if installation.lean else ():
            stack.callback(undo)
        yield installation.state, full


@contextmanager
def controlnet_step(
    model: Any, *, cfg: bool, eager: bool = False
) -> Iterator[tuple[BranchState, int]]:
    """As :func:`patched_step` for a ControlNet, which never runs on the perturbed rows."""
    plan, state = plan_controlnet(model), BranchState()
    rows = 2 if cfg else 1
    state.slabs = (1, rows, rows)
    kept = invariants(model, plan, state) if eager else {}
    with ExitStack() as stack:
        for handle in install(plan.hooks(state, without=kept)):
            stack.callback(handle.remove)
        for invariant in kept.values():
            stack.callback(invariant.install())
        for undo in Lean(model).install(state) if eager else ():
            stack.callback(undo)
        yield state, rows


def stock_flops(model: Any, layers: Any, inputs: Inputs, *, cfg: bool) -> int:
    """FLOPs of a step as diffusers runs it: every branch in full, its own PAG processors."""
    with stock_step(model, layers, cfg=cfg) as rows:
        return count(model, inputs(rows))


def patched_flops(
    model: Any, layers: Any, inputs: Inputs, *, cfg: bool, config: PatchConfig
) -> int:
    """FLOPs of a step as a patched pipeline runs it, the first of a call."""
    with patched_step(model, layers, cfg=cfg, config=config) as (_, rows):
        return count(model, inputs(rows))


def denoiser_cost(
    model: Any, layers: Any, inputs: Inputs, *, cfg: bool, config: PatchConfig | None = None
) -> Cost:
    """What one denoiser call costs with PAG on ``layers``."""
    config = config or PatchConfig()
    return Cost(
        stock_flops(model, layers, inputs, cfg=cfg),
        patched_flops(model, layers, inputs, cfg=cfg, config=config),
        lower_bound(model, trace(model, inputs), layers, inputs, cfg=cfg),
    )


def controlnet_cost(model: Any, inputs: Inputs, *, cfg: bool) -> Cost:
    """What one ControlNet call costs in a PAG pipeline: stock runs it on the perturbed rows too."""
    with controlnet_step(model, cfg=cfg) as (_, rows):
        patched = count(model, inputs(rows))
    bound = _Bound(model, (), cfg=cfg).total(trace(model, inputs))
    return Cost(count(model, inputs(3 if cfg else 2)), patched, bound)


def lower_bound(model: Any, traced: list[Traced], layers: Any, inputs: Inputs, *, cfg: bool) -> int:
    """The least FLOPs of a step: every module once for every branch in which its input differs.

    Derived from the trace alone, not from the plan: the perturbed branch differs from the first
    perturbed layer on, uncond differs from the first module on that sees its text, text keys and
    values never differ between cond and perturbed, and the identity needs no scores.
    """
    found = set(Installation(model, layers, PatchConfig()).attentions)
    order = [t.name for t in traced if t.name in found]
    tokens = _joint_tokens(model, inputs(1))
    return _Bound(model, tuple(order), cfg=cfg, joint=tokens).total(traced)


# modules that see nothing but the timestep or the control image, and nothing but the text
_STEP_ONLY = ("time_embedding", "adaln_single", "time_embed", "controlnet_cond_embedding")
_TEXT_ONLY = ("caption_projection", "context_embedder", "text_embedder", "encoder_hid_proj")


class _Bound:
    """Sums a trace, each module times the number of branches that differ there."""

    def __init__(
        self,
        model: Any,
        perturbed: tuple[str, ...],
        *,
        cfg: bool,
        joint: tuple[int, int] | None = None,
    ) -> None:
        self.model = model
        self.perturbed = perturbed
        self.prompts = 2 if cfg else 1
        self.joint = joint
        self.cross = {
            name
            for name, module in model.named_modules()
            if hasattr(module, "is_cross_attention") and module.is_cross_attention
        }
        config = model.config
        self.text_first = type(model).__name__ in (
            "PixArtTransformer2DModel",
            "SanaTransformer2DModel",
        ) or ("down_block_types" in config and config.get("addition_embed_type") is None)

    def total(self, traced: list[Traced]) -> int:
        total, forked, text_seen = 0, 0, not self.text_first
        fork = self.perturbed[0] if self.perturbed else ""
        for item in traced:
            head, part = self._split(item.name)
            if head in self.cross and part == "to_out":
                text_seen = True  # behind the first scores over text, uncond and cond differ
            prompts = self.prompts if text_seen else 1
            if head and head == fork:
                total += self._fork(item, head, part, prompts)
                forked |= part == "to_out"
            elif head in self.perturbed:
                total += self._perturbed(item, head, part)
            else:
                total += item.flops * self._branches(item.name, head, part, prompts, forked, fork)
        return total

    def _branches(
        self, name: str, head: str, part: str, prompts: int, forked: int, fork: str
    ) -> int:
        """How many branches differ in a module that is not perturbed itself."""
        if name.startswith(_STEP_ONLY):
            return 1
        text_only = name.split(".")[0] in _TEXT_ONLY or part in ("to_k", "to_v")
        # the text of cond and perturbed leaves the forking block's attention unchanged
        same_text = bool(fork and self.joint) and name.startswith(
            f"{fork.rpartition('.')[0]}.ff_context"
        )
        if text_only or same_text:
            return self.prompts
        if name == head:  # scores over the text
            return self.prompts + forked
        return prompts + forked

    def _fork(self, item: Traced, head: str, part: str, prompts: int) -> int:
        if part == "to_out":
            return item.flops * (prompts + 1)
        own = self._own_and_text(item) if item.name == head and self._has_text(head) else 0
        return item.flops * prompts + own

    def _perturbed(self, item: Traced, head: str, part: str) -> int:
        if self._has_text(head):
            if item.name != head:
                return item.flops * (self.prompts + 1)
            assert self.joint is not None
            image, text = self.joint
            text_queries = item.flops * text // (image + text)
            return item.flops * self.prompts + self._own_and_text(item) + text_queries
        skipped = part in ("to_q", "to_k") or item.name == head
        return item.flops * (self.prompts if skipped else self.prompts + 1)

    def _has_text(self, name: str) -> bool:
        module = self.model.get_submodule(name)
        return self.joint is not None and getattr(module, "add_q_proj", None) is not None

    def _own_and_text(self, item: Traced) -> int:
        assert self.joint is not None
        image, text = self.joint
        return item.flops * image * text // (image + text) ** 2

    def _split(self, name: str) -> tuple[str, str]:
        """The attention a module belongs to (``""`` if none) and its part, such as ``to_q``."""
        for attention in (*self.perturbed, *self.cross):
            if name == attention:
                return attention, ""
            if name.startswith(f"{attention}."):
                return attention, name[len(attention) + 1 :].split(".")[0]
        return "", ""


def _joint_tokens(model: Any, call: dict[str, Any]) -> tuple[int, int] | None:
    """``(image, text)`` tokens of a model with joint attention, else ``None``."""
    if type(model).__name__ != "SD3Transformer2DModel":
        return None
    height, width = call["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return (height // patch) * (width // patch), call["encoder_hidden_states"].shape[1]


@dataclass(frozen=True)
class LayerCost:
    """PAG on one layer alone, against CFG without PAG."""

    name: str
    over_cfg: float
    stock_over_cfg: float


def layer_costs(model: Any, inputs: Inputs, *, cfg: bool) -> list[LayerCost]:
    """For every layer that can be perturbed: the least a PAG step there costs, × a step without."""
    traced = trace(model, inputs)
    without = sum(item.flops for item in traced) * (2 if cfg else 1)
    tokens = _joint_tokens(model, inputs(1))
    costs = []
    order = [t.name for t in traced]
    names = sorted(self_attentions(model), key=lambda n: order.index(n) if n in order else 0)
    for name in names:
        bound = _Bound(model, (name,), cfg=cfg, joint=tokens).total(traced)
        branches = (3 / 2) if cfg else 2.0
        costs.append(LayerCost(name, bound / without, branches))
    return costs
