"""Modules that see nothing but the conditioning: computed once per call instead of in every step.

Prompts, added embeddings and the control image are the same in all steps of a call, and so is what
is projected from them alone: text keys and values, caption projections, the embedding of the
control image. Stock diffusers computes them anew in every step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .plan import BranchPlan, argument_names, eager_modules, has_diffusers_hooks, replace_forward
from .rows import Align, BranchState, Leave

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
    value: Any
    epoch: int
    versions: list[int | None]


class Invariant:
    """The forward of a module, computed once for each epoch of its model's :class:`BranchState`.

    Takes the place of ``module.forward`` while a call runs. ``align`` and ``leave`` are the hooks
    of the module's site in the branch plan, which it then does without.

    Attributes:
        kept: the outputs that are handed out again, by ``state.context``.
    """

    def __init__(
        self,
        state: BranchState,
        module: nn.Module,
        align: Align | None = None,
        leave: Leave | None = None,
    ) -> None:
        self.state = state
        self.module = module
        self._align = align
        self._leave = leave
        self._forward: Callable[..., Any] = module.forward
        self.forget()

    def forget(self) -> None:
        """Free the outputs; they are computed anew when they are needed again."""
        self.kept: dict[str, _Output] = {}
        self._step = -1
        self._repeated = False

    def install(self) -> Callable[[], None]:
        """Replace the module's forward; returns what puts it back and forgets the output."""
        self._forward = self.module.forward
        restore = replace_forward(self.module, self)

        def remove() -> None:
            self.forget()
            restore()

        return remove

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # somebody has compiled the model's forward alone
            return self._compute(args, kwargs)
        state = self.state
        # called twice in one forward, its inputs need not be the same
        self._repeated |= self._step == state.step
        self._step = state.step
        kept = self.kept.get(state.context)
        if kept is None or kept.epoch != state.epoch or self._repeated:
            return self._renew(args, kwargs)
        # somebody may have written into it; inference tensors do not tell
        unchanged = kept.versions == _versions(kept.value)
        return kept.value if unchanged else self._renew(args, kwargs)

    def _renew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.kept.pop(self.state.context, None)
        value = self._compute(args, kwargs)
        if self._repeated or not all(isinstance(x, torch.Tensor) for x in _tensors(value)):
            return value
        self.kept[self.state.context] = _Output(value, self.state.epoch, _versions(value))
        return value

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._align is not None:
            args, kwargs = self._align(self.module, args, kwargs) or (args, kwargs)
        out = self._forward(*args, **kwargs)
        if self._leave is None:
            return out
        left = self._leave(self.module, args, out)
        return out if left is None else left

    def weights(self) -> list[Any]:
        """What changes when a callback changes the module's weights or its LoRA scales."""
        found: list[Any] = []
        for module in self.module.modules():
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_inference():
                    found.append((id(parameter), parameter._version))
            lora: Any = module
            if hasattr(lora, "scaling"):
                found += [dict(lora.scaling), list(lora.active_adapters)]
                found += [lora.merged, lora.disable_adapters]
        return found


def _tensors(value: Any) -> list[Any]:
    """The tensors of an output; an IP-Adapter's image projection returns one for each image."""
    return value if isinstance(value, list) else [value]


def _versions(value: Any) -> list[int | None]:
    return [None if x.is_inference() else x._version for x in _tensors(value)]


class Kept:
    """The invariants of one model, or of all ControlNets, while one call runs."""

    def __init__(self, state: BranchState) -> None:
        self.state = state
        self.invariants: list[Invariant] = []
        self._last: dict[str, tuple[Any, int]] = {}  # rows and epoch, by context
        self._weights: Any = None
        self._epochs = state.epoch

    def install(self, invariants: Iterable[Invariant]) -> list[Callable[[], None]]:
        """Put them onto their modules; returns what takes them off again."""
        added = list(invariants)
        self.invariants += added
        return [invariant.install() for invariant in added]

    def advance(self, latents: torch.Tensor, *, same: bool, watched: bool) -> None:
        """Begin a forward: what was kept is good as long as nothing it depends on has changed.

        Args:
            latents: with the rows that the model runs on.
            same: the conditioning is that of the forward before.
            watched: a callback may have changed anything.
        """
        self.state.step += 1
        rows, context = (latents.shape[0], self.state.slabs), self.state.context
        before, epoch = self._last.get(context, (None, -1))
        same = same and rows == before
        if watched:
            # callbacks can change weights and the scales of LoRAs, and write into embeddings, of
            # which tensors made in inference mode tell nothing
            weights = [invariant.weights() for invariant in self.invariants]
            if weights != self._weights:
                self._last.clear()
                same = False
            same = same and not latents.is_inference()
            self._weights = weights
        if not same:
            # others may have counted on, too
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
    made = {}
    for name, module in invariant_modules(model).items():
        site = sites.get(id(module))
        align, leave = (None, None) if site is None else site.hooks(state)
        made[name] = Invariant(state, module, align, leave)
    return made
