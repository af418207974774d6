"""Descriptions of models of unknown classes: at first by their modules, then by their trace."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn

from ...processors.stock import PerturbedStockAttention
from ...sharing.plan import BranchPlan, unshared
from ...sharing.tokens import Tokens
from ..description import ModelDescription
from ..registry import describe, find, keep_traced
from .plan import plan_traced
from .structure import attention_modules
from .trace import Trace

_MOST_SIGNATURES = 16


class Traced:
    """What the forwards of one model have shown so far.

    Attributes:
        trace: what runs in which order; ``None`` before the first forward.
        tokens: for each signature of arguments, which tokens of each attention are the image's.
        verified: signatures for which sharing was compared with separate forwards.
        reason: why nothing is shared, if that comparison has failed; or ``""``.
    """

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.tokens: dict[Any, dict[str, Tokens]] = {}
        self.verified: set[Any] = set()
        self.reason = ""

    def add(self, signature: Any, trace: Trace) -> bool:
        """Note a trace; whether it shows another order than the ones before."""
        made: dict[Any, Tokens] = {}
        tokens = {}
        for attention in trace.attentions:
            # of one object for layers that are alike, graphs are alike
            key = attention.queries, attention.image.shape, attention.image.cpu().numpy().tobytes()
            if key not in made:
                made[key] = Tokens.of(attention.image, attention.queries)
            tokens[attention.name] = made[key]
        self.tokens[signature] = tokens
        while len(self.tokens) > _MOST_SIGNATURES:
            self.verified.discard(next(iter(self.tokens)))
            self.tokens.pop(next(iter(self.tokens)))
        if self.trace is not None and self.trace.structure == trace.structure:
            return False
        self.trace = trace
        return True


def derive(model: nn.Module) -> ModelDescription:
    """The description of a model; of an unknown class one that traces complete.

    Raises:
        ValueError: no module of the model looks like attention.
    """
    found = find(model)
    if found is None:
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
    """What is put on a model rests on this, where its description was derived; else ``None``."""
    found = describe(model)
    if not found.is_derived:
        return None
    own = tuple(id(model.get_submodule(name).processor) for name in found.attentions)
    return id(found), found.traced.reason, own


def complete(model: nn.Module, signature: Any, trace: Trace) -> None:
    """Have a derived description know what a trace has shown.

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
    if traced.add(signature, trace):
        keep_traced(model, _description(model, trace.names, traced))


def _description(model: nn.Module, names: tuple[str, ...], traced: Traced) -> ModelDescription:
    return ModelDescription(
        type(model).__name__,
        PerturbedStockAttention,
        partial(_plan, traced=traced),
        _no_inputs,
        blocks={},
        attentions=names,
        traced=traced,
    )


def _plan(model: Any, perturbed: set[str], *, traced: Traced, **options: Any) -> BranchPlan:
    if traced.reason:
        return unshared(tuple(sorted(perturbed)), traced.reason)
    return plan_traced(model, perturbed, trace=traced.trace, **options)


def _no_inputs(model: Any, *_: Any) -> NoReturn:
    raise ValueError(
        f"No inputs are known for {type(model).__name__}: its description was derived from a call."
    )
