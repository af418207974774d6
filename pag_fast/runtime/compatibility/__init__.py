"""One place knows about others: what hooks, caches and wrappers on a model ask of pag_fast.

:func:`look` finds them by what they do to modules: a replaced class, a replaced forward, a hook, a
parameter of another kind. What is not known runs unshared. :class:`Compatibility` does the same
before every forward, and looks through the modules again only where something has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ...models.registry import is_derived, stock_pag_processors
from .answers import (
    UNKNOWN,
    WEIGHTS,
    Answer,
    Finding,
    combined,
    explain_lines,
    refuse,
)
from .functions import code_of, foreign_functions
from .hooks import (
    Found,
    accelerate_hooks,
    context_parallel,
    diffusers_hook,
    known_parallelism,
    tensor_parallel,
    torch_hooks,
    unknown,
)
from .origins import (
    COMPILED,
    MIXED_PRECISION,
    QUANTIZERS,
    foreign_class,
    foreign_methods,
    forward_origins,
    is_row_wise,
    mro_names,
    origin,
    package,
    row_wise,
)
from .surroundings import Surroundings
from .watch import Watch

__all__ = [
    "HOLDS_ROWS",
    "STOCK_PAG",
    "UNKNOWN",
    "Answer",
    "Compatibility",
    "Finding",
    "attached",
    "combined",
    "explain_lines",
    "look",
    "refuse",
    "row_wise",
]

Foreign = Mapping[type, str]
"""Of classes the package that gives them behaviour, or ``""`` (:func:`foreign_class`)."""
_PLAIN = (nn.Parameter, nn.UninitializedParameter)
_SPLIT = (
    "FreeNoise's split inference cuts the batch inside the model, where uncond, cond and "
    "perturbed rows can no longer be told apart (stock diffusers perturbs the wrong rows). "
    "Use enable_free_noise() without enable_free_noise_split_inference()."
)
_FRAMES = (
    "Cross-frame attention takes the first frame of a batch that holds uncond and cond alone, and "
    "PAG's batches hold a perturbed part too: use set_default_attn_processor()."
)
_CHUNKS: Found = (
    "feed-forward layers in chunks of rows",
    Answer.UNSHARED,
    "feed-forward layers run in chunks of rows (enable_forward_chunking), which fit whole batches.",
)
_OWN_PROCESSOR: Found = (
    "an attention processor marked row-wise",
    Answer.NOTHING_KEPT,
    "its keys may be of more than the text, so none are kept from step to step.",
)
_IN_PARTS: Found = ("weights held in parts", WEIGHTS, "a part of a weight is not fused or kept.")
HOLDS_ROWS = "image embeddings on a projection"
_HOLDS_ROWS: Found = (
    HOLDS_ROWS,
    Answer.KEEP_ROWS,
    "they have a row for each row of the batch (FaceID-Plus), so every step runs every row.",
)
STOCK_PAG = "processors of diffusers' PAG"
_RUNNING: Found = (
    STOCK_PAG,
    Answer.FINE,
    "a PAG pipeline is running on this model, or an error has ended it: its layers have to be "
    "among those that are perturbed here.",
)
_QUANTIZED = "weights have a format of their own, so they are not fused or kept."


def look(
    model: nn.Module,
    modules: Iterable[tuple[str, nn.Module]] | None = None,
    *,
    passes_apart: bool = False,
    own: str = "",
) -> tuple[Finding, ...]:
    """What others have put on a denoiser or ControlNet, and what is done about it.

    Nothing of ours may be on the model, but for the objects that others have captured.

    Args:
        model: as diffusers made it, not the wrapper that ``torch.compile`` returns.
        modules: its ``named_modules()``.
        passes_apart: a step has several forwards, and not all of them hold perturbed rows.
        own: the package whose classes and processors are those of the model itself, of which it was
            seen what they do with rows.
    """
    modules = list(model.named_modules() if modules is None else modules)
    return attached(modules, passes_apart=passes_apart, own=own) + Surroundings(modules).findings(
        model
    )


def own_package(model: nn.Module) -> str:
    """The package of a model that was traced and compared, wherever that is from; else ``""``."""
    return package(type(model).__module__) if is_derived(model) else ""


def attached(
    modules: Iterable[tuple[str, nn.Module]], *, passes_apart: bool = False, own: str = ""
) -> tuple[Finding, ...]:
    """The part of :func:`look` that does not change unless somebody changes the model."""
    places: dict[Found, list[str]] = {}
    known: dict[Found, Found] = {}
    modules = list(modules)
    things = chain((m for _, m in modules), (getattr(m, "processor", None) for _, m in modules))
    foreign = {cls: foreign_class(cls) for cls in set(map(type, things))}
    for name, module in modules:
        if not name:
            known = known_parallelism(module)
        for found in _of_module(name, module, passes_apart, own, foreign):
            names = places.setdefault(found, [])
            if name not in names[-1:]:
                names.append(name)
    if _IN_PARTS in places and not any(what == "FSDP" for what, _, _ in places):
        places[tensor_parallel()] = places.pop(_IN_PARTS)
    places = {known.get(found, found): names for found, names in places.items()}
    return foreign_functions(code_of(module for _, module in modules)) + tuple(
        Finding(what, _where(names), answer, sentence)
        for (what, answer, sentence), names in places.items()
    )


def _where(names: list[str]) -> str:
    first = names[0] or "the model itself"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _of_module(
    name: str, module: nn.Module, passes_apart: bool, own_package: str, foreign: Foreign
) -> Iterator[Found]:
    """Everything on one module."""
    own: Any = vars(module)
    yield from torch_hooks(module, outermost=not name)
    registry = own.get("_diffusers_hook")
    for hook in getattr(registry, "hooks", {}).values():
        yield diffusers_hook(hook, passes_apart=passes_apart)
    if own.get("_hf_hook") is not None:
        yield from accelerate_hooks(own["_hf_hook"])
    if "forward" in own:
        yield from _of_forward(module)
    impl = own.get("_compiled_call_impl")
    if impl is not None:
        yield from _of_call(impl)
    yield from _of_class(name, module, own_package, foreign)
    for method, who in foreign_methods(module):
        yield unknown(f"a method of {who} ({method})")
    yield from _of_parameters(module)
    yield from _of_processor(module, own_package, foreign)
    if (own.get("_chunk_size") or 1) > 1 and own.get("_chunk_dim") == 0:
        yield _CHUNKS
    if "clip_embeds" in own and name.startswith("encoder_hid_proj."):
        yield _HOLDS_ROWS
    config = own.get("_parallel_config")
    if config is not None:
        if getattr(config, "tensor_parallel_config", None) is not None:
            yield tensor_parallel()
        if getattr(config, "context_parallel_config", config) is not None:
            yield context_parallel()


def _compiled() -> Found:
    return "torch.compile", Answer.FINE, "what is compiled stays compiled; nothing is kept in it."


def _of_call(impl: Any) -> Iterator[Found]:
    who = package(origin(impl))
    if who == "torch":
        yield _compiled()
    elif who != "pag_fast":  # the entry of a patched model
        yield unknown(f"a call replaced by {who}")


def _of_forward(module: nn.Module) -> Iterator[Found]:
    for who in forward_origins(module):
        if who == COMPILED:
            yield _compiled()
        elif who == MIXED_PRECISION:
            yield "mixed precision of accelerate", WEIGHTS, "autocast begins behind pag_fast."
        else:
            yield unknown(f"a forward replaced by {who}")


def _of_class(name: str, module: nn.Module, own: str, foreign: Foreign) -> Iterator[Found]:
    cls: Any = type(module)
    names = mro_names(cls)
    if "SplitInferenceModule" in names:
        yield "FreeNoise's split inference", Answer.REFUSE, _SPLIT
    elif "FSDPModule" in names:
        yield "FSDP", WEIGHTS, "a rank holds a part of every weight, so none is fused or kept."
    elif "FullyShardedDataParallel" in names:
        yield unknown("FullyShardedDataParallel")
    elif "parametrizations" in vars(module).get("_modules", {}):
        sentence = "a weight is computed whenever it is read, so it is not fused or kept."
        yield "a parametrized weight", WEIGHTS, sentence
    elif package(cls.__module__) in QUANTIZERS or "GGUFLinear" in names:
        yield "quantized layers", WEIGHTS, _QUANTIZED
    elif "parametrizations." not in name:  # these see weights, never rows
        who = foreign[cls]
        if who in QUANTIZERS:
            yield "quantized layers", WEIGHTS, _QUANTIZED
        elif who and who != own:
            yield unknown(f"a class of {who} ({cls.__name__})")


def _of_parameters(module: nn.Module) -> Iterator[Found]:
    for parameter in module._parameters.values():
        if parameter is None or type(parameter) in _PLAIN:
            continue
        if "DTensor" in mro_names(type(parameter)):
            yield _IN_PARTS
        else:
            yield "quantized layers", WEIGHTS, _QUANTIZED
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_meta:
            yield "offloaded weights", WEIGHTS, "they come and go, so they are not fused or kept."
            return


def _of_processor(module: nn.Module, own: str, foreign: Foreign) -> Iterator[Found]:
    processor = getattr(module, "processor", None)
    if processor is None or isinstance(processor, str):  # a model's setting of that name
        return
    cls: Any = type(processor)
    names = mro_names(cls)
    if any(name.startswith("CrossFrameAttnProcessor") for name in names):
        yield "cross-frame attention", Answer.REFUSE, _FRAMES
    elif getattr(processor, "_parallel_config", None) is not None:
        yield context_parallel()
    elif cls in stock_pag_processors():
        yield _RUNNING
    elif is_row_wise(processor):
        yield _OWN_PROCESSOR
    elif isinstance(processor, nn.Module):
        pass  # the class of a module is looked at where all classes are
    elif foreign[cls] and foreign[cls] != own:
        yield unknown(f"an attention processor of {foreign[cls]} ({cls.__name__})")
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        sentence = "attentions that are not perturbed use it."
        what = f"attention backend {getattr(backend, 'value', backend)}"
        yield what, Answer.FINE, sentence


class Compatibility:
    """:func:`look`, cheap enough to be asked before every forward.

    Args:
        passes_apart, own: as for :func:`look`.

    Attributes:
        looks: how often models had to be looked through.
    """

    def __init__(self, *, passes_apart: bool = False, own: str = "") -> None:
        self.passes_apart = passes_apart
        self.own = own
        self.looks = 0
        self._known: WeakKeyDictionary[nn.Module, tuple[Watch, tuple[Finding, ...]]] = (
            WeakKeyDictionary()
        )

    def look(self, model: nn.Module) -> tuple[Finding, ...]:
        """What others have put on the model, as it is now."""
        known = self._known.get(model)
        if known is None or known[0].changed(model):
            self.looks += 1
            modules = list(model.named_modules())
            known = (
                Watch(model, modules),
                attached(modules, passes_apart=self.passes_apart, own=self.own),
            )
            self._known[model] = known
        # the same object in every forward, where nothing has changed
        around = known[0].surroundings.findings(model)
        return known[1] + around if around else known[1]

    def begin(self) -> None:
        """A call begins: functions that somebody has replaced since are looked at, too."""
        for model, (watch, _) in list(self._known.items()):
            if watch.rewritten():
                del self._known[model]

    def forget(self) -> None:
        """Let go of all models."""
        self._known.clear()
