"""Modules that see nothing but the conditioning: computed once per call instead of in every step.

Prompts, added embeddings and the control image are the same in all steps of a call, and so is what
is projected from them alone: text keys and values, caption projections, the embedding of the
control image. Stock diffusers computes them anew in every step.

Whatever could change what they compute is compared before an output is handed out again. Writes
into weights through ``.data`` leave no trace: for those one kept output of each forward, in turn,
is computed again and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .plan import BranchPlan, argument_names, eager_modules, has_diffusers_hooks
from .replacement import Replacement
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


# relative distance from which two computations of one output differ: both run on the same input,
# and rounded otherwise they would differ in the last bit of some elements
_ROUNDING = 1e-5


@dataclass(frozen=True)
class _Output:
    value: Any
    epoch: int
    versions: list[int | None]
    weights: list[Any]


@dataclass(frozen=True)
class _SpotCheck:
    """A kept output and the same one computed again: norms on the device, which nobody waits for.

    ``size`` is that of the kept output, ``distance`` that of the difference.
    """

    name: str
    size: torch.Tensor
    distance: torch.Tensor
    tolerance: float

    @classmethod
    def of(cls, name: str, before: torch.Tensor, now: torch.Tensor) -> _SpotCheck:
        wide = torch.float32
        return cls(
            name,
            torch.linalg.vector_norm(before, dtype=wide),
            torch.linalg.vector_norm(now - before, dtype=wide),
            max(torch.finfo(now.dtype).eps / 4, _ROUNDING),
        )


class Invariant(Replacement):
    """The forward of a module, computed once for each epoch of its model's :class:`BranchState`.

    ``align`` and ``leave`` are the hooks of the module's site in the branch plan, which it then
    does without. What the module itself consists of is compared whenever it is entered, behind all
    hooks: parameters, buffers, LoRA scales and plain settings.

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
        name: str = "",
    ) -> None:
        super().__init__(state, module)
        self.name = name or type(module).__name__
        self.checks: list[_SpotCheck] | None = None
        self._align = align
        self._leave = leave
        self._weights = WeightSignature(module)
        self.forget()

    def forget(self) -> None:
        """Free the outputs; they are computed anew when they are needed again."""
        self.kept: dict[str, _Output] = {}
        self._step = -1
        self._repeated = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
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
        if kept.versions != _versions(kept.value) or not self._weights.same(kept.weights):
            return self._renew(args, kwargs)
        return kept.value if self.checks is None else self._again(kept, args, kwargs)

    def _again(self, kept: _Output, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand out what the module computes now, and note how far from that the kept output is."""
        checks, self.checks = self.checks, None
        value = self._compute(args, kwargs)
        before, now = _tensors(kept.value), _tensors(value)
        # a pass on fewer rows takes the first ones of what is kept
        if [x.shape for x in before] != [x.shape for x in now]:
            return kept.value
        assert checks is not None
        for old, new in zip(before, now, strict=True):
            if new.is_floating_point():
                checks.append(_SpotCheck.of(self.name, old, new))
        self.kept[self.state.context] = replace(kept, value=value, versions=_versions(value))
        return value

    def _renew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.kept.pop(self.state.context, None)
        weights = self._weights.take()
        value = self._compute(args, kwargs)
        if self._repeated or not all(isinstance(x, torch.Tensor) for x in _tensors(value)):
            return value
        if weights is not None:
            output = _Output(value, self.state.epoch, _versions(value), weights)
            self.kept[self.state.context] = output
        return value

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._align is not None:
            args, kwargs = self._align(self.module, args, kwargs) or (args, kwargs)
        out = self.original(*args, **kwargs)
        if self._leave is None:
            return out
        left = self._leave(self.module, args, out)
        return out if left is None else left


class WeightSignature:
    """What a module computes with: another one whenever somebody has changed it.

    Parameters and buffers are held as objects, since an ``id`` may be given again, with their
    versions and addresses; of the rest the plain settings and the scales of LoRAs are compared.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._found: list[tuple[nn.Module, int, bool]] = []
        self._held: list[torch.Tensor] = []

    def take(self) -> list[Any] | None:
        """What there is now; ``None`` where changes do not show: inference tensors."""
        self._found = [(m, len(m._modules), type(m) is not nn.Linear) for m in self._root.modules()]
        tensors = [
            x
            for module, _, _ in self._found
            for x in (*module._parameters.values(), *module._buffers.values())
            if x is not None
        ]
        if any(x.is_inference() for x in tensors):
            return None
        # an address is compared only as long as nothing else can have got it
        self._held = tensors
        return self._now()

    def same(self, before: list[Any]) -> bool:
        """Whether nothing has changed since :meth:`take` returned ``before``."""
        return self._now() == before

    def _now(self) -> list[Any]:
        found: list[Any] = [torch.is_autocast_enabled(), torch.is_grad_enabled()]
        for module, children, settings in self._found:
            own = module.__dict__
            if len(own["_modules"]) != children:
                return []
            for tensors in (own["_parameters"], own["_buffers"]):
                for name in tensors:
                    x = tensors[name]
                    if x is not None:
                        found += (id(x), x._version if not x.is_inference() else -1, x.data_ptr())
            if settings:
                for name, value in own.items():
                    if isinstance(value, bool | int | float | str):
                        found.append(value)
                    elif name in _ADAPTERS:
                        found.append(dict(value) if isinstance(value, dict) else str(value))
        return found


# of peft's layers: scales by adapter, and which adapters count
_ADAPTERS = ("scaling", "_active_adapter", "merged_adapters")


def _tensors(value: Any) -> list[Any]:
    """The tensors of an output; an IP-Adapter's image projection returns one for each image."""
    return value if isinstance(value, list) else [value]


def _versions(value: Any) -> list[int | None]:
    return [None if x.is_inference() else x._version for x in _tensors(value)]


class ConditioningCache:
    """The invariants of one model, or of all ControlNets, while one call runs.

    In every forward one of them computes its output again, although it is kept
    (:meth:`changed_unseen`). They take turns, from call to call.
    """

    def __init__(self, state: BranchState, invariants: Iterable[Invariant] = ()) -> None:
        self.state = state
        self.invariants = list(invariants)
        self._checks: list[_SpotCheck] = []
        self._checked: Invariant | None = None
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
        self._take_turns()

    def _take_turns(self) -> None:
        """Have the next invariant that has kept something compute it again."""
        if self._checked is not None:
            self._checked.checks = None
        self._checked, state, count = None, self.state, len(self.invariants)
        for turn in range(state.checked, state.checked + count):
            invariant = self.invariants[turn % count]
            if invariant.kept:
                invariant.checks, self._checked = self._checks, invariant
                state.checked = turn + 1
                break

    def changed_unseen(self) -> list[str]:
        """Names of modules that computed something else than was kept, in checks since the last.

        Somebody has written into their weights through ``.data``. This waits for the device, so it
        is for the end of a call.
        """
        checks, self._checks = self._checks, []
        numbers: dict[torch.device, list[torch.Tensor]] = {}
        for check in checks:
            numbers.setdefault(check.size.device, []).extend((check.size, check.distance))
        read = {device: iter(torch.stack(found).tolist()) for device, found in numbers.items()}
        names = []
        for check in checks:
            values = read[check.size.device]
            size, distance = next(values), next(values)
            # what has overflowed tells nothing
            if math.isfinite(size) and not distance <= check.tolerance * size:
                names.append(check.name)
        return list(dict.fromkeys(names))

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
        made[name] = Invariant(state, module, align, leave, name)
    return made
