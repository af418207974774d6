"""What a stock pipeline guides by, and what of it is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import PatchConfig
from ..models.inputs import Inputs
from ..models.registry import uncompiled
from ..pipelines.description import StockGuidance
from ..pipelines.registry import denoiser_names, describe_pipeline
from ..runtime.stock_passes import first_changed
from .explanation import Explanation, ModelCall
from .flops import Cost, count
from .lower_bound import trace


def guidance_cost(model: Any, guidance: StockGuidance, changed: Any, inputs: Inputs) -> Cost:
    """What one forward of a pipeline's own guidance costs for one row; no bound is derived.

    Args:
        model: the denoiser, on the meta device.
        changed: indices of the changed blocks.
        inputs: arguments of cond's forward for a number of rows.
    """
    whole = count(model, {**inputs(1), guidance.argument: list(changed)})
    known = tuple(
        f"{guidance.blocks}.{index}." for index in range(first_changed(model, guidance, changed))
    )
    before = sum(item.flops for item in trace(model, inputs) if f"{item.name}.".startswith(known))
    return Cost(whole, whole - (before if known else 0), 0)


def in_words(guidance: StockGuidance) -> str:
    """What is done about a pipeline's own guidance."""
    return (
        f"{guidance.name}: its forward begins at the first block that {guidance.argument} names, "
        "from what cond's forward had in front of it"
    )


def explain_stock(pipe: Any, *, size: Mapping[str, int]) -> Explanation:
    """The answer of :func:`pag_fast.explain` for a pipeline that gets no PAG."""
    found, described = getattr(pipe, "_pag_fast", None), describe_pipeline(pipe)
    guidance = described.stock_guidance
    assert guidance is not None
    model = uncompiled(getattr(pipe, denoiser_names(pipe)[0]))
    kind = type(model).__name__
    return Explanation(
        pipeline=type(pipe).__name__,
        denoiser=kind,
        is_patched=found is not None,
        backend=PatchConfig().backend,
        layers=(),
        fork=None,
        tree=("uncond | cond   as stock runs them", in_words(guidance)),
        sites=(),
        calls=tuple(
            ModelCall(name, cfg, rows, str(rows))
            for cfg in (True, False)
            for name, rows in ((kind, 1 + cfg), (f"{kind}, {guidance.name}", 1))
        ),
        flops=(),
        size=(size.get("height", 0), size.get("width", 0)),
        schedule="",
        steps={} if found is None else dict(found.steps),
        fallbacks={} if found is None else dict(found.fallbacks),
        source=described.source,
    )
