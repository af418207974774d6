"""What is known of a pipeline and its denoiser, written or seen: for ``pag-fast describe``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..models.description import ModelDescription
from ..models.layer_names import self_attentions
from ..models.registry import describe, uncompiled
from ..models.traced.written import source_of
from ..patching import patched
from ..pipelines.registry import denoiser_names, describe_pipeline
from ..sharing.tokens import Tokens


@dataclass(frozen=True)
class Described:
    """What is known, as lines of text, and as files that a contributor can add.

    Attributes:
        lines: for people.
        sources: by class name, files for :mod:`pag_fast.models` of denoisers that were traced.
    """

    lines: tuple[str, ...]
    sources: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe_by_call(pipe: Any, layers: Any = None, **call: Any) -> Described:
    """What is known of a pipeline and its denoisers; what nobody has described is seen in a call.

    Args:
        pipe: any text-to-image or text-to-video pipeline of diffusers, not patched.
        layers: that are perturbed meanwhile; omitted, the description's, or else one in the middle.
        **call: arguments of the pipeline's call, of two steps or more.

    Raises:
        ValueError: a pipeline that cannot be patched, or a model that cannot be traced.
    """
    described = describe_pipeline(pipe)
    names = denoiser_names(pipe)
    models = {name: uncompiled(getattr(pipe, name)) for name in names}
    seen: dict[str, str] = {}
    unknown = described.is_observed or any(describe(m).is_derived for m in models.values())
    if unknown:
        if layers is None:
            candidates = list(self_attentions(next(iter(models.values()))))
            middle = candidates[len(candidates) // 2].rpartition(".")[0].replace(".", r"\.")
            layers = list(described.layers) or [rf"^{middle}\."]
        with patched(pipe, layers):
            pipe(**call)
            seen = dict(pipe._pag_fast.seen_of_loop)
            seen |= {"shared": _ran(pipe._pag_fast.steps)}
    lines = [f"{type(pipe).__name__}: {_kind(described)}"]
    lines += [f"  {what}: {how}" for what, how in seen.items() if how]
    sources = {}
    for name, model in models.items():
        found = describe(model)
        lines += ["", f"{name}: {found.name}, {_origin(found)}", *_model_lines(model, found)]
        if found.is_derived and not found.traced.written:
            sources[found.name] = source_of(model, found)
    return Described(tuple(lines), sources)


def _kind(described: Any) -> str:
    if not described.is_written:
        return "nobody has described it; seen in its call"
    passes = {"together": "together in one forward", "apart": "a forward for each"}
    passes["observed"] = "as its guider says"
    branches = passes.get(described.passes, "cond alone")
    layers = ", ".join(described.layers) or "named by the user"
    return f"described; branches {branches}; layers {layers}"


def _ran(steps: Counter[str]) -> str:
    return ", ".join(f"{how} in {count} steps" for how, count in steps.items())


def _origin(found: ModelDescription) -> str:
    if not found.is_derived:
        return "described"
    return "described, and traced" if found.traced.written else "derived from a forward"


def _model_lines(model: Any, found: ModelDescription) -> Iterator[str]:
    trace = found.traced.trace if found.is_derived else None
    if trace is None:
        yield from _ranges("attentions over image tokens", list(self_attentions(model)))
        return
    yield from _ranges("blocks, as they run", list(trace.blocks))
    yield from _ranges("attentions over image tokens", list(trace.names))
    tokens = next(iter(found.traced.tokens.values()))
    for what, names in _grouped({name: _tokens(x) for name, x in tokens.items()}).items():
        yield f"  tokens: {what}, in {len(names)} of them"
    apart = [a.name for a in trace.attentions if not a.grows]
    if apart:
        yield f"  at the fork {len(apart)} of them run on all rows: {apart[0]}, …"
    for name, why in trace.left_out.items():
        yield f"  cannot be perturbed: {name}, {why}"
    if found.traced.reason:
        yield f"  not shared: {found.traced.reason}"


def _tokens(tokens: Tokens) -> str:
    if tokens.context < 0:
        return "in another place in every row"
    runs = [
        f"{len(list(group))} {'image' if is_image else 'context'}"
        for is_image, group in groupby(tokens.image[0].tolist())
    ]
    return ", ".join(runs if len(runs) < 6 else [*runs[:5], "…"])


def _grouped(names: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, what in names.items():
        found.setdefault(what, []).append(name)
    return found


def _ranges(title: str, names: list[str]) -> Iterator[str]:
    """Names that differ in one number, in one line."""
    yield f"  {title}: {len(names)}"
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = (name, "") if at is None else (".".join(parts[:at]), ".".join(parts[at + 1 :]))
        groups.setdefault(key, []).append("" if at is None else parts[at])
    for (front, back), numbers in groups.items():
        span = numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        yield "    " + ".".join(part for part in (front, span, back) if part)
