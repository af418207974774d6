"""The branch plan of one model: where its branches part, and the hooks that follow from it."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .layout import Residuals
from .rows import LEVEL_NAMES, SHARED, SPLIT, Align, BranchState, Leave, LeaveSkips
from .sequence import Entered


@dataclass(frozen=True)
class Site:
    """A module whose rows are changed on the way in, and where ``leaves`` is set on the way out."""

    name: str
    module: nn.Module
    arrives: int
    runs: int
    leaves: int | None = None
    streams: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of positional arguments, where some have no rows
    twice: tuple[str, ...] = ()

    def hooks(self, state: BranchState) -> tuple[Align, Leave | None]:
        """The pre-hook and, where rows change on the way out, the hook of this site."""
        leave = None if self.leaves is None else Leave(state, self.runs, self.leaves)
        align = Align(state, self.arrives, self.runs, self.streams, self.names, self.twice)
        return align, leave

    def __str__(self) -> str:
        path = [self.arrives, self.runs] + ([] if self.leaves is None else [self.leaves])
        return f"{self.name}: " + " → ".join(LEVEL_NAMES[level] for level in path)


@dataclass(frozen=True)
class SkipSite:
    """A UNet down block and the levels of its skip tensors, as made and as stored, in order."""

    name: str
    module: nn.Module
    made: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass
class BranchPlan:
    """Everything that is known about sharing in one model for one set of perturbed layers.

    Attributes:
        fork: name of the attention where the perturbed branch begins; ``None`` for a ControlNet.
        begins: where the perturbed branches part from cond, if not in the fork: behind blocks that
            they skip, or that they leave as a permutation of cond.
        levels: level each perturbed attention's input arrives at (SPLIT except at the fork).
        sites, skip_sites: modules to hook.
        residual_levels: levels of the UNet skips that ControlNet residuals are added to, in order.
        mid_level: level behind the mid block, where a ControlNet's mid residual is added.
        adapter_levels: levels behind the down blocks, where a T2I-Adapter's residuals are added.
        takes_adapters: the UNet has an argument for these.
        block_residuals: what a ControlNet adds between the blocks of a transformer, and the levels
            behind these blocks.
        merged: whether some site runs at MERGED; ``merged_until`` names where uncond parts.
        order: the perturbed attentions and blocks in execution order.
        blocks: levels a perturbed block's input arrives at and that it runs on (both SPLIT if it is
            not here).
        shuffled: blocks from a shuffled fork on whose perturbed rows are a permutation of cond's.
        sequence: of a model that was traced, ``(name, arrives, leaves)`` of the modules that have
            to run in this order, and whether each is given all rows and hands on all.
        reason: why nothing can be shared, or ``""``.
    """

    fork: str | None = None
    begins: str = ""
    levels: dict[str, int] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    skip_sites: list[SkipSite] = field(default_factory=list)
    residual_levels: tuple[int, ...] = ()
    mid_level: int = SPLIT
    adapter_levels: tuple[int, ...] = ()
    takes_adapters: bool = False
    block_residuals: tuple[tuple[Residuals, tuple[int, ...]], ...] = ()
    merged: bool = False
    merged_until: str = ""
    order: tuple[str, ...] = ()
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    shuffled: tuple[str, ...] = ()
    sequence: tuple[tuple[str, bool, bool], ...] = ()
    reason: str = ""

    def extend(self, block: str, before: str) -> None:
        """The perturbed branches begin behind this block, if they begin behind the one before."""
        if block == self.fork or (before and self.begins == before):
            self.begins = block

    def hooks(
        self, state: BranchState, without: Container[str] = ()
    ) -> list[tuple[nn.Module, Any, Any]]:
        """``(module, pre-hook or None, post-hook or None)`` for every site, built once.

        The sites named in ``without`` are left out.
        """
        hooks: list[tuple[nn.Module, Any, Any]] = [
            (s.module, None, LeaveSkips(state, s.name, s.made, s.stored)) for s in self.skip_sites
        ]
        noted = {name for name, _, _ in self.sequence} - set(self.order)
        hooks += [(s.module, Entered(state, s.name), None) for s in self.sites if s.name in noted]
        hooks += [(s.module, *s.hooks(state)) for s in self.sites if s.name not in without]
        return hooks


def install(hooks: Iterable[tuple[nn.Module, Any, Any]]) -> list[RemovableHandle]:
    """Register hooks made by :meth:`BranchPlan.hooks`; the handles remove them again."""
    handles = []
    for module, before, after in hooks:
        if before is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(after))
    return handles


def compiled_call(module: nn.Module) -> Any:
    """What ``module.compile()`` has made; an entry of ours in front of it does not count."""
    found = vars(module).get("_compiled_call_impl")
    return getattr(found, "displaced", found)


def is_compiled(module: nn.Module) -> bool:
    """Whether somebody has compiled the module, in place or its forward alone."""
    forward = vars(module).get("forward")
    return compiled_call(module) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def modules_of(model: nn.Module) -> list[tuple[int, bool]]:
    """Something that is equal as long as a model has the same modules, and the same compiled."""
    return [(id(module), is_compiled(module)) for module in model.modules()]


def eager_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without those that are compiled and what is inside them."""
    compiled: list[str] = []
    for name, module in model.named_modules():
        if is_compiled(module):
            compiled.append(f"{name}." if name else "")
        if not any(f"{name}.".startswith(prefix) for prefix in compiled):
            yield name, module


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put ``forward`` on one module; returns what puts back what was there."""
    own = vars(module).get("forward")
    module.forward = forward

    def restore() -> None:
        # offloading hooks may have been taken off, or put on, behind us
        if vars(module).get("forward") is not forward:
            return
        if own is None:
            del module.forward
        else:
            module.forward = own

    return restore


def count_places(model: nn.Module) -> Counter[int]:
    """In how many places of a model each module stands, by its ``id``."""
    owned = chain.from_iterable(module._modules.values() for module in model.modules())
    return Counter(map(id, owned))


def in_two_places(model: nn.Module) -> str:
    """Why branches of a model are not shared that runs one module in several places; or ``""``.

    Modules are cut and kept as objects, by the place where they were found first.
    """
    places = count_places(model)
    for name, module in model.named_modules():
        # an activation may be everybody's
        if places[id(module)] > 1 and next(module.parameters(), None) is not None:
            return f"{name} stands in several places of the model"
    return ""


def has_diffusers_hooks(module: nn.Module) -> bool:
    """Whether hooks of diffusers do something when the module runs: fetch or cast its weights."""
    # an empty registry is what cache_context leaves behind
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def class_name(module: nn.Module) -> str:
    """The name of a module's class, or of the one that ``fully_shard`` has made a subclass of."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, which some models pass by position."""
    cls: Any = type(module)
    return _argument_names(cls, cls.forward)


@functools.lru_cache(maxsize=1024)
def _argument_names(cls: Any, forward: Any) -> tuple[str, ...]:
    """Those of diffusers' class, or of one that names them: a subclass may take ``*args``."""
    found = [base for base in cls.__mro__ if "forward" in vars(base) and base is not nn.Module]
    found.sort(key=lambda base: not base.__module__.startswith("diffusers."))
    for function in (*[vars(base)["forward"] for base in found], forward):
        parameters = list(inspect.signature(_innermost(function)).parameters.values())
        names = tuple(p.name for p in parameters[1:] if p.kind == p.POSITIONAL_OR_KEYWORD)
        if not any(p.kind == p.VAR_POSITIONAL for p in parameters):
            break
    return names


def _innermost(forward: Any) -> Any:
    """What a forward wraps, with ``functools.wraps`` or without, as far as it shows."""
    forward = inspect.unwrap(forward)
    for cell in getattr(forward, "__closure__", None) or ():
        with suppress(ValueError):  # an empty one
            inner = cell.cell_contents
            if isinstance(inner, FunctionType) and inner.__name__ == "forward":
                return _innermost(inner)
    return forward


def unshared(order: tuple[str, ...], reason: str) -> BranchPlan:
    """A plan that shares nothing, and says why."""
    return BranchPlan(levels=dict.fromkeys(order, SPLIT), order=order, reason=reason)


# projections of the text: it is the same for cond and perturbed, wherever the branches are
_TEXT_PROJECTIONS = ("caption_projection", "text_embedder", "encoder_hid_proj")


def text_projection_sites(model: Any) -> list[Site]:
    """Sites for projections of the text that the model applies to all rows at its entry."""
    return [
        Site(name, module, SPLIT, SHARED, leaves=SPLIT)
        for name, module in model.named_children()
        if name in _TEXT_PROJECTIONS
        # with an IP-Adapter this slot holds its image projection, which takes other arguments
        and class_name(module) != "MultiIPAdapterImageProjection"
    ]


def text_key_sites(block: Any, name: str) -> list[Site]:
    """Sites for the text keys and values of a block behind the fork, equal for two branches."""
    attn = getattr(block, "attn2", None)
    # LTX's second attention does not say that it is one over the text
    if attn is None or not getattr(attn, "is_cross_attention", True):
        return []
    return [
        Site(f"{name}.attn2.{part}", getattr(attn, part), SPLIT, SHARED, leaves=SPLIT)
        for part in ("to_k", "to_v")
    ]


def block_sites(
    prefix: str,
    attentions: list[tuple[str, nn.Module]],
    fork: str,
    level: int,
) -> list[Site]:
    """Sites inside the block that holds the fork, itself entered at SPLIT.

    ``attentions`` are the block's self-attentions in execution order. Those before the fork still
    see equal rows; the fork itself takes rows of ``level`` and its processor returns SPLIT.
    """
    sites = []
    for name, module in attentions:
        full = f"{prefix}.{name}"
        if full == fork:
            sites.append(Site(full, module, SPLIT, level, names=argument_names(module)))
            break
        sites.append(Site(full, module, SPLIT, SHARED, SPLIT, names=argument_names(module)))
    return sites
