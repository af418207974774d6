"""Modules that see nothing but the conditioning: computed once per call instead of in every step.

Prompts, added embeddings and the control image are the same in all steps of a call, and so is what
is projected from them alone: text keys and values, caption projections, the embedding of the
control image. Stock diffusers computes them anew in every step.
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
from .weight_signature import WeightSignature

# see text, image embeddings, sizes or the control image, never latents or timesteps
_EMBEDDINGS = (
    "add_embedding",
    "add_time_proj",
    "caption_norm",
    "caption_projection",
    "condition_embedder.image_embedder",
    "condition_embedder.text_embedder",
    "context_embedder",
    "controlnet_cond_embedding",
    "encoder_hid_proj",
    "patch_embed.text_proj",
    "text_embedder",
    "time_caption_embed.caption_embedder",
    "time_extra_emb.extra_embedder",
    "time_extra_emb.pooler",
    "time_extra_emb.size_proj",
    "time_text_embed.text_embedder",
    "txt_in",
    "txt_norm",
)
_KEYS_AND_VALUES = ("to_k", "to_v", "to_kv")
_IMAGE_KEYS_AND_VALUES = re.compile(r".*\.processor\.to_[kv]_ip\.\d+")


@dataclass(frozen=True)
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
    """

    def __init__(
        self,
        state: BranchState,
        module: nn.Module,
        align: Align | None = None,
        leave: Leave | None = None,
        weights: WeightSignature | None = None,
    ) -> None:
        super().__init__(state, module)
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
                if version is None or version == (
                    _version(value) if isinstance(version, list) else value._version
                ):
                    return value
        return self._renew(args, kwargs, number)

    def _renew(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: int) -> Any:
        self.kept.pop(self.state.context, None)
        value = self._compute(args, kwargs)
        parts = value if isinstance(value, list) else [value]
        if self._repeated or not all(isinstance(x, torch.Tensor) for x in parts):
            return value
        if self._weights.sees(self.module):
            output = _Output(value, self.state.epoch, _version(value), weights)
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


def _version(value: Any) -> Any:
    """The version of an output, or versions: an IP-Adapter's image projection returns a list.

    ``None`` for inference tensors, which do not tell whether somebody has written into them.
    """
    if isinstance(value, list):
        return [_version(x) for x in value]
    return None if value.is_inference() else value._version


class ConditioningCache:
    """The invariants of one model, or of all ControlNets, while one call runs."""

    def __init__(self, state: BranchState, invariants: Iterable[Invariant] = ()) -> None:
        self.state = state
        self.invariants = list(invariants)
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
        if not same or rows != before:
            # the state may have been advanced for other invariants of the same model, too
            self._epochs = epoch = max(self._epochs, self.state.epoch) + 1
        self._last[context] = rows, epoch
        self.state.epoch = epoch

    def forget(self) -> None:
        """Free every output."""
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
    # a motion module's attentions are over frames, whatever they call themselves
    attention = model.get_submodule(name)
    return bool(getattr(attention, "is_cross_attention", False)) and "motion_modules" not in name


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
        made[name] = Invariant(state, module, align, leave, weights)
    return made
