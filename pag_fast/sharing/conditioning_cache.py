"""Modules that see nothing but the conditioning: computed once per call instead of in every step.

Prompts, added embeddings and the control image are the same in all steps of a call, and so is what
is projected from them alone: text keys and values, caption projections, the embedding of the
control image. Stock diffusers computes them anew in every step.

Whatever could change what they compute is compared before an output is handed out again. Writes
into weights through ``.data`` leave no trace: for those one kept output a step, in turn, is
computed again and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .plan import BranchPlan, argument_names, eager_modules, has_diffusers_hooks
from .replacement import Replacement
from .rows import Align, BranchState, Leave
from .spot_checks import SpotChecks
from .weight_signature import WeightSignature

# see text, image embeddings, sizes or the control image, never latents or timesteps
_EMBEDDINGS = (
    "add_embedding",
    "add_time_proj",
    "cap_embedder",
    "caption_norm",
    "caption_projection",
    "condition_embedder.image_embedder",
    "condition_embedder.text_embedder",
    "context_embedder",
    "context_embedder_2",
    "controlnet_cond_embedding",
    "controlnet_x_embedder",
    "encoder_hid_proj",
    "image_embedder",
    "input_block",
    "input_hint_block",
    "p_embedder",
    "patch_embed.text_proj",
    "pos_embed_input",
    "text_embedder",
    "text_fusion",
    "time_caption_embed.caption_embedder",
    "time_extra_emb.extra_embedder",
    "time_extra_emb.pooler",
    "time_extra_emb.size_proj",
    "time_text_embed.text_embedder",
    "txt_in",
    "txt_norm",
)
_IN_A_LIST = re.compile(r"(caption_projection)\.\d+")
_KEYS_AND_VALUES = ("to_k", "to_v", "to_kv")
_IMAGE_KEYS_AND_VALUES = re.compile(r".*\.processor\.to_[kv]_ip\.\d+")


@dataclass
class _Output:
    """A kept output: good for one epoch, as long as neither it nor the weights are changed."""

    value: Any
    epoch: int
    version: Any
    weights: int


class Invariant(Replacement):
    """The forward of a module, computed once for each epoch of its model's :class:`BranchState`.

    ``align`` and ``leave`` are the hooks of the module's site in the branch plan, which it then
    does without. ``weights`` tells whether what the module consists of has been changed; without
    one it has its own.

    Attributes:
        kept: the outputs that are handed out again, by ``state.context``.
        checks: where the next one is noted that is computed again, rather than handed out;
            ``None``: it is not this module's turn.
    """

    def __init__(
        self,
        state: BranchState,
        module: nn.Module,
        align: Align | None = None,
        leave: Leave | None = None,
        weights: WeightSignature | None = None,
        name: str = "",
    ) -> None:
        super().__init__(state, module)
        self.name = name or type(module).__name__
        own = self.name.rpartition(".")[2]
        self.is_inner = own in _KEYS_AND_VALUES or bool(_IMAGE_KEYS_AND_VALUES.fullmatch(self.name))
        self.checks: SpotChecks | None = None
        self._align = align
        self._leave = leave
        self._weights = WeightSignature([module]) if weights is None else weights
        self.forget()

    def forget(self) -> None:
        """Free the outputs; they are computed anew when they are needed again."""
        self.kept: dict[str, _Output] = {}
        self._step = -1
        self._repeated = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # somebody has compiled the model's forward alone
            return self._compute(args, kwargs)
        state, weights = self.state, self._weights
        # called twice in one forward, its inputs need not be the same
        if self._step == state.step:
            self._repeated = True
        self._step = state.step
        number = weights.number if weights.step == state.step else weights.look(state.step)
        if state.context in self.kept and not self._repeated:
            kept = self.kept[state.context]
            if kept.epoch == state.epoch and kept.weights == number:
                value, version = kept.value, kept.version
                # somebody may have written into it
                if version == (_version(value) if isinstance(version, list) else value._version):
                    return value if self.checks is None else self._again(kept, args, kwargs)
        return self._renew(args, kwargs, number)

    def _again(self, kept: _Output, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand out what the module computes now, and note how far from that the kept output is."""
        checks, self.checks = self.checks, None
        value, before = self._compute(args, kwargs), kept.value
        pairs = (
            ((before, value),) if type(value) is torch.Tensor else zip(before, value, strict=True)
        )
        for old, new in pairs:
            # a pass on fewer rows takes the first ones of what is kept
            if old.shape != new.shape:
                return before
            checks.add(self.name, old, new)  # type: ignore[union-attr]
        kept.value, kept.version = _telling(value)
        return kept.value

    def _renew(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: int) -> Any:
        self.kept.pop(self.state.context, None)
        value = self._compute(args, kwargs)
        if self._repeated or not all(isinstance(x, torch.Tensor) for x in _tensors(value)):
            return value
        # a graph is gone through once, and each step may have a way back of its own
        if any(x.requires_grad for x in _tensors(value)):
            return value
        if self._weights.sees(self.module):
            value, version = _telling(value)
            output = _Output(value, self.state.epoch, version, weights)
            self.kept[self.state.context] = output
        return value

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._align is not None:
            args, kwargs = self._align(self.module, args, kwargs) or (args, kwargs)
        out = self.run_original(args, kwargs)
        if self._leave is None:
            return out
        left = self._leave(self.module, args, out)
        return out if left is None else left


def _tensors(value: Any) -> list[Any]:
    """The tensors of an output; an IP-Adapter's image projection returns one for each image."""
    return value if isinstance(value, list) else [value]


def _version(value: Any) -> Any:
    """The version of an output, or versions: an IP-Adapter's image projection returns a list."""
    return [_version(x) for x in value] if isinstance(value, list) else value._version


def _telling(value: Any) -> tuple[Any, Any]:
    """An output that tells whether somebody writes into it, and its version.

    Hooks and processors of others get what is kept. Inference tensors do not tell: they have copies
    that do.
    """
    if isinstance(value, list):
        told = [_telling(x) for x in value]
        return [x for x, _ in told], [version for _, version in told]
    if value.is_inference():
        with torch.inference_mode(False):
            value = value.clone()
    return value, value._version


class ConditioningCache:
    """The invariants of one model, or of all ControlNets, while one call runs.

    In every step one of them computes its output again, although it is kept; they take turns, from
    call to call.

    Attributes:
        checks: what has come of it.
        somebody_writes: a callback, for example, could write into the conditioning.
    """

    somebody_writes = False

    def __init__(self, state: BranchState, invariants: Iterable[Invariant] = ()) -> None:
        self.state = state
        self.invariants = list(invariants)
        self.checks = SpotChecks()
        self._checked: Invariant | None = None
        # those that see what the model is called with, and no kept output of another
        self._first = [x for x in self.invariants if not x.is_inner]
        self._firsts = 0
        # the pass of a step that checks; the others run the same modules
        self._checking: str | None = None
        self._last: dict[str, tuple[Any, int]] = {}  # rows and epoch, by context
        self._epochs = state.epoch

    def advance(self, latents: torch.Tensor, *, same: bool) -> None:
        """Begin a forward: what was kept is good as long as nothing it depends on has changed.

        Args:
            latents: with the rows that the model runs on.
            same: the conditioning is that of the forward before.
        """
        self.state.step += 1
        rows, context = (latents.shape[0], self.state.slabs), self.state.context
        before, epoch = self._last.get(context, (None, -1))
        if not same:
            # steps with and without the perturbed rows take turns: what both have kept is outdated
            whose = context.partition(" ")[0]
            for other in [x for x in self._last if x.partition(" ")[0] == whose]:
                del self._last[other]
        if not same or rows != before:
            # the state may have been advanced for other invariants of the same model, too
            self._epochs = epoch = max(self._epochs, self.state.epoch) + 1
        self._last[context] = rows, epoch
        self.state.epoch = epoch
        if self._checking is None:
            self._checking = context
        if same and context == self._checking:
            self._take_turns()

    def _take_turns(self) -> None:
        """Have the next invariant that has kept something compute it again."""
        if self._checked is not None:
            self._checked.checks = None
        self._checked, state, count = None, self.state, len(self.invariants)
        self._firsts += self.somebody_writes
        if self._firsts % 2 and self._first:
            # what keys are computed of is kept, too: writes into the conditioning show here alone
            invariant = self._first[self._firsts // 2 % len(self._first)]
            if invariant.kept:
                invariant.checks, self._checked = self.checks, invariant
                return
        for turn in range(state.checked, state.checked + count):
            invariant = self.invariants[turn % count]
            if invariant.kept:
                invariant.checks, self._checked = self.checks, invariant
                state.checked = turn + 1
                break

    def forget(self) -> None:
        """Free every output; what has been checked is still to be told."""
        if self._checked is not None:
            self._checked.checks = None
            self._checked = None
        for invariant in self.invariants:
            invariant.forget()


def invariant_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a denoiser or ControlNet that see nothing but the conditioning, by name.

    Compiled modules and what is inside them are left out: their compiler sees to launches, and a
    value that is kept from outside would not fit its memory plan. So are modules with hooks of
    diffusers: with group offloading, the forward of one module fetches the weights of the next.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in eager_modules(model):
        parent, _, own = name.rpartition(".")
        if (
            name in _EMBEDDINGS
            or _IN_A_LIST.fullmatch(name)
            or (own in _KEYS_AND_VALUES and _sees_text(model, parent))
            or _IMAGE_KEYS_AND_VALUES.fullmatch(name)
        ):
            hooked = any(map(has_diffusers_hooks, module.modules()))
            # HunyuanVideo refines its text anew in every step
            steady = "timestep" not in argument_names(module)
            if id(module) not in seen and steady and not hooked:
                found[name] = module
            seen.add(id(module))
    return found


def _sees_text(model: nn.Module, name: str) -> bool:
    attention = model.get_submodule(name)
    # UNets with SimpleCrossAttn blocks project the image with them, and the text with others
    added = "AddedKV" in type(getattr(attention, "processor", None)).__name__
    # a motion module's attentions are over frames, whatever they call themselves
    over_text = not added and "motion_modules" not in name
    return over_text and bool(getattr(attention, "is_cross_attention", False))


def invariants(model: nn.Module, plan: BranchPlan, state: BranchState) -> dict[str, Invariant]:
    """The :class:`Invariant` of each module in :func:`invariant_modules`, by name.

    Their sites are left out of the hooks by ``plan.hooks(state, without=...)``.
    """
    sites = {id(site.module): site for site in plan.sites}
    found = invariant_modules(model)
    weights = WeightSignature(found.values())
    made = {}
    for name, module in found.items():
        site = sites.get(id(module))
        align, leave = (None, None) if site is None else site.hooks(state)
        made[name] = Invariant(state, module, align, leave, weights, name)
    return made
