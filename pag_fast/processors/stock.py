"""Attention of a model that nobody has described: its own code runs, around our product.

The layer's stock processor projects, normalises, rotates and projects out as ever. While it runs,
PyTorch's attention is taken for ours on the way: image tokens first, perturbed rows perturbed, and
at the fork with more rows than went in.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..perturbations import Identity
from ..sharing.sequence import note
from ..sharing.tokens import Tokens
from .rows import PerturbedProcessor

PRODUCT = F.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def product_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``scaled_dot_product_attention`` by name."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


class InPlaceOfProduct(TorchFunctionMode):
    """While this is on, ``function`` gets what ``scaled_dot_product_attention`` is called with."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not PRODUCT:
            return func(*args, **(kwargs or {}))
        return self.function(**product_arguments(args, kwargs or {}))


class PerturbedStockAttention(PerturbedProcessor):
    """Calls the processor that it displaces, with the product replaced.

    Which tokens are the image's is in the branch state, under the layer's name: it was seen in a
    trace of the model (:mod:`pag_fast.models.traced`).
    """

    _call: Any = None
    _count = 0

    def takes_place_of(self, stock: Any) -> None:
        super().takes_place_of(stock)
        self._call = with_product(stock, self.product, self.dispatched)

    def run(self, attn: Any, kwargs: dict[str, Any]) -> Any:
        """The layer on the arguments of its processor.

        Raises:
            ValueError: the layer's attention is not PyTorch's, or the model was not traced.
        """
        hidden_states = next(iter(kwargs.values()))
        num_attend, num_forked = self.rows(hidden_states.shape[0])
        if num_attend == hidden_states.shape[0] and not num_forked:
            return self.displaced(attn, **kwargs)
        call = self._call
        assert self.state is not None
        if self.state.sequence is not None:
            note(self.state, self.layer.name)
        if torch.compiler.is_dynamo_compiling():
            return call(attn, **kwargs)
        self._count = 0
        if isinstance(call, types.MethodType):
            out = call(attn, **kwargs)
        else:
            with InPlaceOfProduct(self.product):
                out = call(attn, **kwargs)
        if self._count != 1:
            raise ValueError(
                f"{self.layer.name} calls PyTorch's attention {self._count} times, and once is "
                "what can be perturbed: choose other layers."
            )
        return out

    def scored(self, num_attend: int, total: int, num_context: int = 0) -> int:
        return total if num_context else super().scored(num_attend, total)

    def same_input(self, attn: Any) -> int:
        return 3

    def means_query(self, attn: Any, num_attend: int, total: int, rotary: Any) -> bool:
        return False

    # ---- the product ----

    def dispatched(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """In place of ``dispatch_attention_fn`` of diffusers: ``[rows, N, H, D]`` in and out."""
        if attn_mask is not None and attn_mask.ndim == 2:
            attn_mask = attn_mask[:, None, None, :]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = self.product(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out.transpose(1, 2)

    def product(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """In place of PyTorch's attention: ``[rows, H, N, D]``, with rows more out at the fork."""
        if not torch.compiler.is_dynamo_compiling():
            self._count += 1
        assert self.state is not None and self.state.slabs is not None
        num_attend, num_forked = self.split(query.shape[0], self.state.slabs)
        tokens, name = self.state.tokens.get(self.layer.name), self.layer.name
        fits = tokens is not None and value.shape[-2] == tokens.image.shape[1]
        if tokens is None or not fits or query.shape[-2] != tokens.queries:
            raise ValueError(
                f"{name} attends to another sequence than in the trace of its model: it cannot be "
                "told which tokens are the image's."
            )
        if is_causal or dropout_p:
            raise ValueError(f"{name} is causal or has dropout, which cannot be perturbed.")
        if query.shape[1] != key.shape[1]:  # grouped queries
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        by_key = attn_mask is None or (attn_mask.ndim == 4 and attn_mask.shape[2] == 1)
        way = self._dense
        if tokens.are_uniform and by_key and value.shape[-1] == query.shape[-1]:
            way = self._fused
        return way(query, key, value, attn_mask, scale, tokens, num_attend, num_forked)

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        tokens: Tokens,
        num_attend: int,
        num_forked: int,
    ) -> torch.Tensor:
        """By the ops that every described model uses."""
        order, back = tokens.order, tokens.back
        if order is not None:
            query, key, value = (x.index_select(2, order) for x in (query, key, value))
            mask = None if mask is None else mask.index_select(3, order)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scored = self.scored(num_attend, value.shape[0], tokens.context)
        out = self.attention(
            query[:scored],
            key[:scored],
            # it may be overwritten, and the layer may have further use for its own
            value.clone(memory_format=torch.contiguous_format) if order is None else value,
            num_attend=num_attend,
            num_forked=num_forked,
            num_context=tokens.context,
            attn_mask=mask,
            scale=scale,
        )
        return (out if back is None else out.index_select(1, back)).transpose(1, 2)

    def _dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        tokens: Tokens,
        num_attend: int,
        num_forked: int,
    ) -> torch.Tensor:
        """By a mask over all pairs of tokens: where rows, or queries, have their own."""
        if [type(branch) for branch in self.branches] != [Identity]:
            raise ValueError(
                f"{self.layer.name} has a mask of its own for every query, or text in another "
                "place in every row: the identity alone can perturb it."
            )
        rows, a = value.shape[0], num_attend
        source = slice(a - num_forked, a) if num_forked else slice(a, rows)
        if mask is not None and mask.ndim == 4:
            mask = mask.expand(rows, -1, -1, -1)
        own = _without(_rows(mask, source), tokens.forbidden(), query)
        parts = [PRODUCT(query[source], key[source], value[source], own, scale=scale)]
        if a:
            mask = _rows(mask, slice(a))
            parts.insert(0, PRODUCT(query[:a], key[:a], value[:a], mask, scale=scale))
        return torch.cat(parts)


def _rows(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return mask[rows] if mask is not None and mask.ndim == 4 else mask


def _without(
    mask: torch.Tensor | None, forbidden: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """A mask for ``scaled_dot_product_attention`` that forbids some pairs more."""
    if mask is None or mask.dtype == torch.bool:
        return ~forbidden if mask is None else mask & ~forbidden
    return mask.masked_fill(forbidden, float("-inf")).to(query.dtype)


def with_native_backend(processor: Any) -> Any:
    """A copy of a processor of diffusers that runs PyTorch's attention; others as they are."""
    if not hasattr(processor, "_attention_backend"):
        return processor
    from diffusers.models.attention_dispatch import AttentionBackendName

    processor = copy.copy(processor)
    processor._attention_backend = AttentionBackendName.NATIVE
    return processor


class _Functional:
    """``torch.nn.functional`` with another attention."""

    def __init__(self, product: Any) -> None:
        vars(self).update(vars(F))
        self.scaled_dot_product_attention = product


def with_product(processor: Any, product: Any, dispatched: Any) -> Any:
    """A function that does what ``processor`` does, with its attention replaced.

    The code of its call is run with other globals, which compilers can follow where they cannot
    follow a mode. Where attention is not called by that code itself the processor is returned, with
    PyTorch's attention set, and a mode has to take its place.
    """
    call = getattr(type(processor), "__call__", None)  # noqa: B004
    if not inspect.isfunction(call) or hasattr(call, "__wrapped__"):
        return with_native_backend(processor)
    own, names = call.__globals__, call.__code__.co_names
    replaced: dict[str, Any] = {}
    if "dispatch_attention_fn" in names and "dispatch_attention_fn" in own:
        replaced["dispatch_attention_fn"] = dispatched
    if "scaled_dot_product_attention" in names:
        functional = _Functional(product)
        replaced |= {name: functional for name in names if own.get(name) is F}
    if not replaced:
        return with_native_backend(processor)
    # without a name compilers take these globals, and not those of the module of that name
    space = {name: value for name, value in own.items() if name != "__name__"} | replaced
    made = types.FunctionType(
        call.__code__, space, call.__name__, call.__defaults__, call.__closure__
    )
    made.__kwdefaults__ = call.__kwdefaults__
    return made.__get__(processor)


@functools.cache
def in_place_of(stock: type) -> type[PerturbedStockAttention]:
    """The processor for layers that have one of class ``stock``, with its call's arguments.

    ``Attention.forward`` of diffusers hands on what the signature of a processor's call names, and
    compilers read no signature but that of the function's own code. So the code is written.
    """
    call = inspect.unwrap(stock.__call__)
    parameters = list(inspect.signature(call).parameters.values())[2:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in kinds]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    signature = ", ".join(
        f"{p.name}=defaults[{p.name!r}]" if p.name in defaults else p.name for p in named
    )
    extra = ", **rest" if any(p.kind == p.VAR_KEYWORD for p in parameters) else ""
    given = "".join(f"{p.name!r}: {p.name}, " for p in named)
    source = (
        f"def __call__(self, attn, {signature}{extra}):\n"
        f"    return self.run(attn, {{{given}{'**rest' if extra else ''}}})\n"
    )
    space: dict[str, Any] = {"defaults": defaults}
    exec(source, space)  # names of a signature alone
    body = {"__call__": space["__call__"], "__doc__": PerturbedStockAttention.__doc__}
    return type("PerturbedStockAttention", (PerturbedStockAttention,), body)
