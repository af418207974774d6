"""One forward of a model that shows which tokens are the image's, and what runs in which order.

The latents are NaN, and in place of PyTorch's attention every token keeps its own value. So tokens
do not mix, and wherever a token's value is NaN it is one of the image. Nothing of the pipeline is
touched: tensors that go in are copies, random numbers are drawn as if nothing had happened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...processors.stock import InPlaceOfProduct, with_native_backend
from .preserved import preserved, random_numbers_kept
from .structure import attention_modules, block_of, first_parameter

Call = dict[str, Any]
# of two runs that differ in the order of sums alone, in units of the last place
_ROUNDING = 16.0
PLAIN = bool | int | float | str | torch.dtype | torch.device | None


@dataclass(frozen=True, eq=False)
class TracedAttention:
    """An attention that mixes image tokens.

    Attributes:
        name: of the module.
        image: ``[rows, keys]``, bool: the key is an image token.
        queries: how many queries there are.
        heads: how many heads the queries have.
        grows: the module hands on rows that its attention adds.
    """

    name: str
    image: torch.Tensor
    queries: int
    heads: int
    grows: bool


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        attentions: that can be perturbed, in execution order.
        blocks: of all attentions, those that see the text alone included, in execution order.
        left_out: attentions over image tokens that cannot be perturbed, and why.
        skips: of blocks, the arguments that hold what an earlier block than the one before has
            returned: long skips.
        memory: what every forward leaves something else in, read by none that was seen.
    """

    attentions: tuple[TracedAttention, ...]
    blocks: tuple[str, ...]
    left_out: dict[str, str]
    skips: dict[str, tuple[str, ...]]
    memory: tuple[str, ...] = ()

    @property
    def structure(self) -> Any:
        """Everything but which tokens are the image's."""
        kinds = tuple((attention.heads, attention.grows) for attention in self.attentions)
        return self.names, kinds, self.blocks, self.skips

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attentions."""
        return tuple(attention.name for attention in self.attentions)


@torch.no_grad()
def trace(model: nn.Module, call: Call) -> Trace:
    """Run ``model`` on copies of the arguments ``call``; nobody else may run it meanwhile.

    A model that holds something else afterwards runs again, to see what that does.

    Raises:
        ValueError: arguments that may hold what another forward leaves there, or a model that does
            not run like this, or whose forwards depend on those before.
    """
    latents = first_parameter(model)
    check_plain(call)
    seen, memory, after, fresh = _Seen(model), tuple[str, ...](), None, None
    arguments = {name: _copy(value) for name, value in call.items()}
    arguments[latents] = _nan(call[latents])
    try:
        with preserved(model) as held:
            with random_numbers_kept(model), seen.names(), InPlaceOfProduct(seen.product):
                model.forward(**arguments)
            left = held.changes()
            if left:
                after = _predicted(model, call)
        if left:
            with preserved(model):
                fresh = _predicted(model, call)
                with preserved(model) as again:
                    _predicted(model, call)
                    memory = again.changes()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} has no description in pag_fast, and cannot be traced: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_plain(arguments)  # an object that was empty, and is not any more
    if left and not _alike(after, fresh):
        raise ValueError(
            f"{type(model).__name__} has no description in pag_fast, and cannot be traced: what "
            f"a forward leaves in it ({shortly(left)}) changes what the next one returns, so rows "
            "of a perturbed branch would change the picture. Switch off what the model keeps from "
            "forward to forward, if it can be, or describe it as CONTRIBUTING.md says."
        )
    return replace(seen.trace(), memory=memory)


def shortly(names: Sequence[str]) -> str:
    """Three names at most, and how many there are more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _predicted(model: nn.Module, call: Call) -> list[torch.Tensor]:
    """The floating tensors that a forward returns."""
    with random_numbers_kept(model):
        return _floating(model.forward(**_copy(call)))


def _floating(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value
    is_collection = isinstance(value, dict | list | tuple)
    return [x for item in items for x in _floating(item)] if is_collection else []


def _alike(one: list[torch.Tensor] | None, other: list[torch.Tensor] | None) -> bool:
    """Whether two runs of one forward have returned the same, within rounding."""
    assert one is not None and other is not None
    return len(one) == len(other) and all(
        x.shape == y.shape
        and bool((x - y).norm() <= _ROUNDING * torch.finfo(x.dtype).eps * y.norm())
        for x, y in zip(one, other, strict=True)
    )


def check_plain(value: Any, name: str = "") -> None:
    """Raises ValueError for arguments other than tensors, numbers, texts and collections of them.

    A cache of keys, for example, would be left with what the trace has put there. An object that
    holds no tensor is taken, as long as forwards put none into it.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(item, name or str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item, name)
    elif not isinstance(value, torch.Tensor | PLAIN) and contents(value) is None:
        raise ValueError(
            f"The denoiser is called with {name}={type(value).__name__}(…), which may keep "
            "something from forward to forward, and its class has no description in pag_fast: it "
            "cannot be traced. A description can be added, see CONTRIBUTING.md."
        )


def contents(value: Any) -> Any:
    """What an object without tensors holds, to be compared; ``None`` where it may hold some."""
    if isinstance(value, PLAIN):
        return value, type(value)
    if isinstance(value, list | tuple):
        items = [contents(item) for item in value]
    elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        items = [(name, contents(item)) for name, item in vars(value).items()]
        items = [None if item is None else (name, item) for name, item in items]
    else:
        return None
    return None if None in items else (type(value), tuple(items))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not isinstance(value, PLAIN | list | tuple | dict):
        return copy.deepcopy(value)
    if isinstance(value, list | tuple):
        made = [_copy(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _nan(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_nan(item) for item in value]
    return torch.full_like(value, float("nan"))


class _Seen:
    """What is noted while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known = attention_modules(model)
        names = [block_of(model, name) for name in self.known]
        self._blocks = {name: model.get_submodule(name) for name in names if name}
        self._returned: list[list[torch.Tensor]] = []
        self._skips: dict[str, tuple[str, ...]] = {}
        self._stack: list[str] = []
        self._probing = False
        self._order: list[str] = []
        self._products: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._grows: dict[str, bool] = {}
        self._heads: dict[str, int] = {}

    @contextmanager
    def names(self) -> Iterator[None]:
        """While this is on, :meth:`product` knows which module calls it."""
        watched = [(x, self._noted(name, x.forward)) for name, x in self.known.items()]
        watched += [(x, self._watched(name, x.forward)) for name, x in self._blocks.items()]
        own = [vars(module).get("forward") for module, _ in watched]
        try:
            for module, forward in watched:
                module.forward = forward
            yield
        finally:
            for (module, _), before in zip(watched, own, strict=True):
                if before is None:
                    del module.forward
                else:
                    module.forward = before

    def _watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block, whose arguments are compared with what blocks have returned."""

        def run(*args: Any, **kwargs: Any) -> Any:
            earlier = [id(x) for returned in self._returned[:-1] for x in returned]
            skips = tuple(key for key, x in kwargs.items() if id(x) in earlier)
            if skips:
                self._skips[name] = skips
            out = forward(*args, **kwargs)
            self._returned.append(_tensors(out))
            return out

        return run

    def _noted(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        module = self.known[name]

        def run(*args: Any, **kwargs: Any) -> Any:
            self._stack.append(name)
            processor = module.processor
            try:
                # other backends than PyTorch's do not come by here
                module.processor = with_native_backend(processor)
                out = forward(*args, **kwargs)
                if name in self._products and name not in self._grows:
                    self._grows[name] = self._hands_on(forward, args, kwargs, out)
                return out
            finally:
                module.processor = processor
                self._stack.pop()

        return run

    def _hands_on(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, out: Any
    ) -> bool:
        """Whether twice as many rows come out of a module if its attention adds as many."""
        rows = [x.shape[0] for x in _tensors(out)]
        self._probing = True
        try:
            more = forward(*args, **kwargs)
        except RuntimeError:
            return False
        finally:
            self._probing = False
        return [x.shape[0] for x in _tensors(more)] == [2 * n for n in rows]

    def product(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """In place of attention: every token keeps its own value."""
        if query.shape[-2] == value.shape[-2] and query.isnan().any() == value.isnan().any():
            out = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        else:
            # text that looks at the image, or the other way round: what is NaN stays so
            out = query[..., :1].expand(*query.shape[:-1], value.shape[-1]) * 0
        if self._probing:
            return torch.cat([out, out])
        if self._stack:
            queries, keys = (x.isnan().any(-1).any(1) for x in (query, value))
            self._products.setdefault(self._stack[-1], []).append((queries, keys))
            self._order.append(self._stack[-1])
            self._heads[self._stack[-1]] = query.shape[1]
        return out

    def trace(self) -> Trace:
        order = list(dict.fromkeys(self._order))
        found, left_out = [], {}
        for name in order:
            products = self._products[name]
            queries, keys = products[0]
            if not (queries.any() and keys.any()):
                continue  # the text alone, or the image that looks at the text
            reason = _reason(products)
            if reason:
                left_out[name] = reason
                continue
            kind = queries.shape[1], self._heads[name], self._grows[name]
            found.append(TracedAttention(name, keys, *kind))
        blocks = [block_of(self.model, name) for name in order]
        in_order = tuple(dict.fromkeys(block for block in blocks if block))
        return Trace(tuple(found), in_order, left_out, self._skips)


def _reason(products: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Why an attention cannot be perturbed; empty if it can."""
    queries, keys = products[0]
    if len(products) > 1:
        return "it attends more than once"
    if queries.shape[1] != keys.shape[1]:
        if not bool((queries.sum(1) == keys.sum(1)).all()) or not bool(queries.all()):
            return "its queries are other tokens than its keys"
    elif not torch.equal(queries, keys):
        return "its queries are other tokens than its keys"
    return ""


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [x for x in values if isinstance(x, torch.Tensor)]
