"""Descriptions of models of unknown classes: at first by their modules, then by their trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...processors.stock import PerturbedStockAttention
from ...sharing.arguments import frames_of, latents_of, lists_by_row
from ...sharing.layout import attention_names
from ...sharing.plan import BranchPlan, unshared
from ...sharing.rows import map_tensors
from ...sharing.tokens import Tokens
from ..description import ModelDescription
from ..layer_names import self_attentions
from ..registry import describe, find, keep_traced
from ..tensors import Latent, NewTensors
from .plan import plan_traced
from .structure import attention_modules
from .trace import Trace, shortly
from .turns import Turns

_MOST_SIGNATURES = 16


class Traced:
    """What the forwards of one model have shown so far.

    Args:
        written: somebody has described the class, and tests hold that sharing is exact.

    Attributes:
        trace: what runs in which order; ``None`` before the first forward.
        changes: how often another order was seen.
        tokens: for each signature of arguments, which tokens of each attention are the image's.
        verified: ``(signature, layers, branches)`` for which sharing was compared with separate
            forwards, and how far these differ between batches of two sizes.
        turns: which of the later steps are compared.
        reason: why nothing is shared, if that comparison has failed; or ``""``.
        example: ``(arguments, rows, tokens)`` of the first forward that was traced, on the meta
            device.
    """

    def __init__(self, *, written: bool = False) -> None:
        self.written = written
        self.trace: Trace | None = None
        self.changes = 0
        self.tokens: dict[Any, dict[str, Tokens]] = {}
        self.verified: dict[Any, float] = {}
        self.turns = Turns()
        self.reason = ""
        self.example: tuple[dict[str, Any], int, dict[str, Tokens]] | None = None

    def add(self, signature: Any, trace: Trace, call: dict[str, Any]) -> bool:
        """Note the trace of ``call``; whether it shows another order than the ones before."""
        made: dict[Any, Tokens] = {}
        tokens = {}
        for attention in trace.attentions:
            # of one object for layers that are alike, graphs are alike
            key = attention.queries, attention.image.shape, attention.image.cpu().numpy().tobytes()
            if key not in made:
                made[key] = Tokens.of(attention.image, attention.queries)
            tokens[attention.name] = made[key]
        self.tokens[signature] = tokens
        if self.example is None:
            rows = latents_of(call).shape[0]
            shapes = {name: map_tensors(x, lambda x: x.to("meta")) for name, x in call.items()}
            self.example = shapes, rows, {name: x.to("meta") for name, x in tokens.items()}
        while len(self.tokens) > _MOST_SIGNATURES:
            oldest = next(iter(self.tokens))
            del self.tokens[oldest]
            self.verified = {k: x for k, x in self.verified.items() if k[0] != oldest}
        if self.trace is not None and self.trace.structure == trace.structure:
            return False
        self.trace = trace
        self.changes += 1
        return True


def derive(model: nn.Module) -> ModelDescription:
    """The description of a model; of an unknown class, or a traced one, one that traces complete.

    Raises:
        ValueError: no module of the model looks like attention.
    """
    found = find(model)
    if found is not None and found.is_traced:
        assert found.layout is not None
        names = attention_names(model, found.layout)
        found = _description(model, names, Traced(written=True))
        keep_traced(model, found)
    # of a known class, with blocks that the class has not where it is described
    if found is None or (not found.is_derived and not self_attentions(model)):
        names = tuple(attention_modules(model))
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no description in pag_fast, and no module with "
                "an attention processor as those of diffusers have: there is nothing to perturb."
            )
        found = _description(model, names, Traced())
        keep_traced(model, found)
    return found


def seen_of(model: nn.Module) -> Any:
    """What is put on a model rests on this, where its layers' own processors run; else ``None``."""
    found = describe(model)
    if found.tokens is not None:
        return tuple(type(module.processor) for module in self_attentions(model).values())
    if not found.is_derived:
        return None
    own = tuple(id(model.get_submodule(name).processor) for name in found.attentions)
    return found.traced.changes, found.traced.reason, own


def complete(model: nn.Module, signature: Any, trace: Trace, call: dict[str, Any]) -> None:
    """Have a derived description know what a trace of ``call`` has shown.

    Raises:
        ValueError: no attention of the model mixes image tokens.
    """
    if not trace.attentions:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in trace.left_out.items())
        raise ValueError(
            f"No attention of {type(model).__name__} can be perturbed: none was seen that mixes "
            f"tokens of the image by PyTorch's scaled_dot_product_attention ({reasons or 'none'})."
        )
    traced = describe(model).traced
    if trace.memory and not traced.reason:
        traced.reason = (
            f"every forward leaves something in the model ({shortly(trace.memory)}), which later "
            "ones may read"
        )
    if traced.add(signature, trace, call):
        keep_traced(model, _description(model, trace.names, traced))


def _description(model: nn.Module, names: tuple[str, ...], traced: Traced) -> ModelDescription:
    return ModelDescription(
        type(model).__name__,
        PerturbedStockAttention,
        partial(_plan, traced=traced),
        partial(_inputs, traced=traced),
        blocks={},
        attentions=names,
        traced=traced,
    )


def _plan(model: Any, perturbed: set[str], *, traced: Traced, **options: Any) -> BranchPlan:
    if traced.reason:
        return unshared(tuple(sorted(perturbed)), traced.reason)
    return plan_traced(model, perturbed, trace=traced.trace, **options)


def _inputs(
    model: Any, new: NewTensors, rows: int, latent: Latent, *, traced: Traced
) -> dict[str, Any]:
    """Arguments like those of the forward that was traced, of the size that it had."""
    if traced.example is None:
        raise ValueError(
            f"No inputs are known for {type(model).__name__}: its description is derived from its "
            "first forward, which has not run yet."
        )
    call, have, _ = traced.example
    batched = have, have * frames_of(call)

    def made(x: torch.Tensor) -> torch.Tensor:
        first = x.shape[0] // have * rows if x.shape[0] in batched else x.shape[0]
        shape = first, *x.shape[1:]
        return new(*shape, dtype=None if x.is_floating_point() else x.dtype)

    by_row = lists_by_row(call, have)
    return {
        name: map_tensors(x[:1] * rows if name in by_row else x, made)
        for name, x in call.items()
        if name != "return_dict"
    }
