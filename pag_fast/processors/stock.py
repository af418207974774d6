"""Attention of a model that nobody has described: its own code runs, around our product.

The layer's stock processor projects, normalises, rotates and projects out as ever. While it runs,
PyTorch's attention is taken for ours on the way: image tokens first, perturbed rows perturbed, and
at the fork with more rows than went in.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..perturbations import Identity
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

    _native: tuple[Any, Any] = (None, None)

    def native(self) -> Any:
        """The displaced processor with PyTorch's attention, whatever backend it was set to."""
        if self._native[0] is not self.displaced:
            self._native = self.displaced, with_native_backend(self.displaced)
        return self._native[1]

    def run(self, attn: Any, kwargs: dict[str, Any]) -> Any:
        """The layer on the arguments of its processor.

        Raises:
            ValueError: the layer's attention is not PyTorch's, or the model was not traced.
        """
        hidden_states = next(iter(kwargs.values()))
        num_attend, num_forked = self.rows(hidden_states.shape[0])
        if num_attend == hidden_states.shape[0] and not num_forked:
            return self.displaced(attn, **kwargs)
        assert self.state is not None
        product = _Product(self, self.state.tokens.get(self.layer.name), num_attend, num_forked)
        with InPlaceOfProduct(product.run):
            out = self.native()(attn, **kwargs)
        if product.count != 1:
            raise ValueError(
                f"{self.layer.name} calls PyTorch's attention {product.count} times, and once is "
                "what can be perturbed: choose other layers."
            )
        return out

    def scored(self, num_attend: int, total: int, num_context: int = 0) -> int:
        return total if num_context else super().scored(num_attend, total)

    def same_input(self, attn: Any) -> int:
        return 3

    def means_query(self, attn: Any, num_attend: int, total: int, rotary: Any) -> bool:
        return False


class _Product:
    """The one product of a layer, for one forward."""

    def __init__(
        self,
        processor: PerturbedStockAttention,
        tokens: Tokens | None,
        num_attend: int,
        num_forked: int,
    ) -> None:
        self.processor, self.tokens = processor, tokens
        self.num_attend, self.num_forked = num_attend, num_forked
        self.count = 0

    def run(
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
        """``[rows, H, N, D]`` in and out, as PyTorch has it; with ``num_forked`` rows more."""
        self.count += 1
        tokens, name = self.tokens, self.processor.layer.name
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
        if tokens.are_uniform and by_key and value.shape[-1] == query.shape[-1]:
            return self._fused(query, key, value, attn_mask, scale, tokens)
        return self._dense(query, key, value, attn_mask, scale, tokens)

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        tokens: Tokens,
    ) -> torch.Tensor:
        """By the ops that every described model uses."""
        order, back = tokens.order, tokens.back
        if order is not None:
            query, key, value = (x.index_select(2, order) for x in (query, key, value))
            mask = None if mask is None else mask.index_select(3, order)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scored = self.processor.scored(self.num_attend, value.shape[0], tokens.context)
        out = self.processor.attention(
            query[:scored],
            key[:scored],
            # it may be overwritten, and the layer may have further use for its own
            value.clone(memory_format=torch.contiguous_format) if order is None else value,
            num_attend=self.num_attend,
            num_forked=self.num_forked,
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
    ) -> torch.Tensor:
        """By a mask over all pairs of tokens: where rows, or queries, have their own."""
        if [type(branch) for branch in self.processor.branches] != [Identity]:
            raise ValueError(
                f"{self.processor.layer.name} has a mask of its own for every query, or text in "
                "another place in every row: the identity alone can perturb it."
            )
        rows, a, forked = value.shape[0], self.num_attend, self.num_forked
        source = slice(a - forked, a) if forked else slice(a, rows)
        forbidden = tokens.forbidden()
        if mask is not None:
            mask = mask.expand(rows, -1, -1, -1) if mask.ndim == 4 else mask
        own = None if mask is None else (mask[source] if mask.ndim == 4 else mask)
        own = _without(own, forbidden, query)
        parts = (
            [] if not a else [PRODUCT(query[:a], key[:a], value[:a], _rows(mask, a), scale=scale)]
        )
        parts.append(PRODUCT(query[source], key[source], value[source], own, scale=scale))
        return torch.cat(parts)


def _rows(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    return mask[:rows] if mask is not None and mask.ndim == 4 else mask


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
