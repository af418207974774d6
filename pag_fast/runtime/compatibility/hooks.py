"""Hooks of diffusers, accelerate and torch by what they do to rows and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...models.registry import find
from .answers import CACHE, UNKNOWN, WEIGHTS, Answer
from .origins import TRUSTED, is_row_wise, mro_names, origin, package

Found = tuple[str, Answer, str]
"""What was found, the answer, and the sentence about it."""

_MOVED = "weights move or change their dtype while the model runs, so they are not fused or kept."
_CACHED = (
    "it stores outputs by their place in the batch, so branches are not shared and every step "
    "runs every row."
)
_APART = (
    "{} keeps one output for all passes of a step, and the passes of this pipeline hold different "
    "numbers of rows: use a cache that tells passes apart, such as FirstBlockCache or "
    "TaylorSeerCache, or call disable_cache()."
)
_NO_TP = (
    "Tensor parallelism gives each rank some of the heads, and of this model it is not known that "
    "perturbed attention is right with these alone: run this pipeline without it, or with "
    "fully_shard."
)
_NO_CP = (
    "Context parallelism gives each rank a part of every sequence, and of this model it is not "
    "known how to have all of it in a perturbed attention: run this pipeline without "
    "enable_parallelism(), a picture or a prompt per rank."
)
_TP = "a rank perturbs its own heads; weights are held in parts, so none is fused or kept."
_CP = "a perturbed layer has all tokens for its rank's part of the heads, and exchanges them."
_OFFLOADING = {
    "LayerwiseCastingHook": "layerwise casting",
    "PeftInputAutocastDisableHook": "layerwise casting",
    "GroupOffloadingHook": "group offloading",
    "LazyPrefetchGroupOffloadingHook": "group offloading",
    "LayerExecutionTrackerHook": "group offloading",
}
_CACHES = {
    "FBCHeadBlockHook": "FirstBlockCache",
    "FBCBlockHook": "FirstBlockCache",
    "MagCacheHeadHook": "MagCache",
    "MagCacheBlockHook": "MagCache",
    "SeaCacheRootHook": "SeaCache",
    "SeaCacheLeaderBlockHook": "SeaCache",
    "SeaCacheBlockHook": "SeaCache",
    "SeaCachePostNormHook": "SeaCache",
    "TaylorSeerCacheHook": "TaylorSeerCache",
    "PyramidAttentionBroadcastHook": "PyramidAttentionBroadcast",
    "FasterCacheDenoiserHook": "FasterCache",
    "FasterCacheBlockHook": "FasterCache",
}
_SKIPS = {"AttentionProcessorSkipHook", "FeedForwardSkipHook", "TransformerBlockSkipHook"}


def unknown(what: str) -> Found:
    """The answer to what nobody has looked into."""
    sentence = (
        f"pag_fast does not know what {what} does to rows of other branches: every branch runs "
        "with rows of its own in every step (behind the pipeline's, where that has no PAG), and no "
        "weights are fused or kept. If it treats every row by itself, say so with "
        "pag_fast.runtime.compatibility.row_wise()."
    )
    return what, UNKNOWN, sentence


CONTEXT_PARALLEL, TENSOR_PARALLEL = "context parallelism", "tensor parallelism"
PARALLEL = frozenset({CONTEXT_PARALLEL, TENSOR_PARALLEL})
"""What has each forward say which tokens, or which heads, are here."""


def context_parallel() -> Found:
    """The answer to sequences that are split over ranks."""
    return CONTEXT_PARALLEL, Answer.REFUSE, _NO_CP


def tensor_parallel() -> Found:
    """The answer to projections that are split over ranks."""
    return TENSOR_PARALLEL, Answer.REFUSE, _NO_TP


def known_parallelism(model: nn.Module) -> dict[Found, Found]:
    """The answers to these, where perturbed layers of a model are known to be exact."""
    described = find(model)
    found = {}
    if described is not None and described.cut is not None:
        found[context_parallel()] = CONTEXT_PARALLEL, Answer.FINE, _CP
    if described is not None and described.shares_heads:
        found[tensor_parallel()] = TENSOR_PARALLEL, WEIGHTS, _TP
    return found


def cut_arguments(module: nn.Module) -> frozenset[str]:
    """Arguments that hooks of context parallelism cut when they enter a module."""
    plans = [hook.metadata for hook in _hooks(module) if _cuts(hook)]
    return frozenset(name for plan in plans if isinstance(plan, dict) for name in plan)


def has_other_hooks(module: nn.Module) -> bool:
    """Whether hooks of diffusers do more when a module runs than to cut or join its tokens."""
    return not all(map(_cuts, _hooks(module)))


def _hooks(module: nn.Module) -> list[Any]:
    return list(getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values())


def _cuts(hook: Any) -> bool:
    return any(name.startswith("ContextParallel") for name in mro_names(type(hook)))


def diffusers_hook(hook: Any, *, passes_apart: bool) -> Found:
    """What a hook of a diffusers registry asks for."""
    cls = type(hook)
    if package(cls.__module__) != "diffusers":
        return unknown(f"a hook of {package(cls.__module__)} ({cls.__name__})")
    names = mro_names(cls)
    for name in names & _OFFLOADING.keys():
        return _OFFLOADING[name], WEIGHTS, _MOVED
    for name in names & _CACHES.keys():
        return _cache(_CACHES[name], hook, passes_apart)
    if _cuts(hook):
        return context_parallel()
    if names & _SKIPS:
        return _skip(hook)
    if "SmoothedEnergyGuidanceHook" in names:
        what = "smoothed energy guidance"
        sentence = "it blurs queries by themselves, so weights are not fused; nothing is shared."
        return what, Answer.UNSHARED | Answer.WEIGHTS_APART, sentence
    if any(name.startswith("TextKVCache") for name in names):
        sentence = (
            "TextKVCache finds text by its address, and the rows of perturbed branches are copies "
            "whose addresses change: call disable_cache()."
        )
        return "TextKVCache", Answer.REFUSE, sentence
    return unknown(f"diffusers' {cls.__name__}")


def _cache(name: str, hook: Any, passes_apart: bool) -> Found:
    if name == "FasterCache" and not getattr(hook, "is_guidance_distilled", False):
        sentence = (
            "FasterCache cuts every batch into an uncond and a cond half, and PAG's batches hold "
            "a perturbed part too: call disable_cache(), or use another cache."
        )
        return name, Answer.REFUSE, sentence
    without_context = name in ("PyramidAttentionBroadcast", "FasterCache")
    if passes_apart and without_context:
        return name, Answer.REFUSE, _APART.format(name)
    return name, CACHE, _CACHED


def _skip(hook: Any) -> Found:
    if getattr(hook, "skip_attention_scores", False):
        sentence = (
            "Layer skipping with skip_attention_scores replaces PyTorch's attention, which "
            "perturbed layers do not call: remove the hook, or skip whole layers."
        )
        return "layer skipping", Answer.REFUSE, sentence
    answer = Answer.UNSHARED | Answer.MAY_SKIP
    if not math.isclose(getattr(hook, "dropout", 1.0), 1.0):
        answer |= Answer.NOTHING_KEPT
    return "layer skipping", answer, "branches may part in a layer that is left out: none share."


def accelerate_hooks(hook: Any) -> Iterator[Found]:
    """What a module's ``_hf_hook`` asks for; it may be a sequence of hooks."""
    cls = type(hook)
    names = mro_names(cls)
    if package(cls.__module__) != "accelerate":
        yield unknown(f"a hook of {package(cls.__module__)} ({cls.__name__})")
    elif "SequentialHook" in names:
        for inner in hook.hooks:
            yield from accelerate_hooks(inner)
    elif "AlignDevicesHook" in names:
        if hook.offload:
            yield "offloading of accelerate, layer by layer", WEIGHTS, _MOVED
        else:
            sentence = "a layer's inputs follow its device, so its weights are not fused."
            yield "a device map", Answer.WEIGHTS_APART, sentence
    elif "CpuOffload" in names:
        sentence = "the model's weights move as a whole, so they are not fused."
        yield "offloading of whole models", Answer.WEIGHTS_APART, sentence
    elif "LayerwiseCastingHook" in names:
        yield "layerwise casting", WEIGHTS, _MOVED
    elif cls.__name__ != "ModelHook":  # the base class does nothing
        yield unknown(f"accelerate's {cls.__name__}")


def torch_hooks(module: nn.Module, *, outermost: bool = False) -> Iterator[Found]:
    """What forward hooks and forward pre-hooks of a module ask for.

    Those of the model itself (``outermost``) see all rows, however few run inside of it.
    """
    for hook in module._forward_pre_hooks.values():
        found = torch_hook(hook)
        if found is not None:
            yield _in_front(found) if outermost and found[1] == UNKNOWN else found
    for hook in module._forward_hooks.values():
        found = torch_hook(hook)
        if found is not None:
            yield _behind(found) if outermost and found[1] == UNKNOWN else found


def _in_front(found: Found) -> Found:
    sentence = (
        "it may change arguments and weights: they are compared behind it, every step runs every "
        "row, and no weights are fused or kept."
    )
    answer = Answer.RECHECK | Answer.KEEP_ROWS | Answer.SEES_ROWS | WEIGHTS
    return f"{found[0]} in front of the model", answer, sentence


def _behind(found: Found) -> Found:
    sentence = "it gets the output of all branches, so every step runs every row."
    return f"{found[0]} behind the model", Answer.KEEP_ROWS | Answer.SEES_ROWS, sentence


def torch_hook(hook: Any) -> Found | None:
    """What one hook of PyTorch's kind asks for, if anything."""
    where = origin(hook)
    # a diffusers pipeline's own hook knows the batch that it makes itself
    if (
        package(where) == "pag_fast"
        or where.startswith("diffusers.pipelines.")
        or is_row_wise(hook)
    ):
        return None
    if where.startswith("torch.distributed.tensor"):
        return tensor_parallel()
    # FSDP shows in the module's class; trackers and profilers read nothing but names
    if where.startswith(("torch.distributed.fsdp", "torch.utils.module_tracker", "torch.profiler")):
        return None
    if where.startswith("torch.nn.utils"):
        sentence = "a weight is computed before every forward, so it is not fused or kept."
        return "a normalised or pruned weight", WEIGHTS, sentence
    if package(where) in TRUSTED:
        return unknown(f"a forward hook of {where}")
    return unknown(f"a forward hook of {package(where)}")
