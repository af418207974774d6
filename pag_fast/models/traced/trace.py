"""One forward of a model that shows which tokens are the image's, and what runs in which order.

The latents are NaN, and in place of PyTorch's attention every token keeps its own value. So tokens
do not mix, and wherever a token's value is NaN it is one of the image. Nothing of the pipeline is
touched: tensors that go in are copies, random numbers are drawn as if nothing had happened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...processors.stock import InPlaceOfProduct, with_native_backend
from .structure import attention_modules, block_of, first_parameter

Call = dict[str, Any]
_PLAIN = bool | int | float | str | torch.dtype | torch.device | None


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
    """

    attentions: tuple[TracedAttention, ...]
    blocks: tuple[str, ...]
    left_out: dict[str, str]
    skips: dict[str, tuple[str, ...]]

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

    Raises:
        ValueError: arguments that may hold what another forward leaves there, or a model that does
            not run like this.
    """
    latents = first_parameter(model)
    check_plain(call)
    seen = _Seen(model)
    arguments = {name: _copy(value) for name, value in call.items()}
    arguments[latents] = _nan(call[latents])
    try:
        with undisturbed(model), seen.names(), InPlaceOfProduct(seen.product):
            model.forward(**arguments)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} has no description in pag_fast, and cannot be traced: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_plain(arguments)  # an object that was empty, and is not any more
    return seen.trace()


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
    elif not isinstance(value, torch.Tensor | _PLAIN) and contents(value) is None:
        raise ValueError(
            f"The denoiser is called with {name}={type(value).__name__}(…), which may keep "
            "something from forward to forward, and its class has no description in pag_fast: it "
            "cannot be traced. A description can be added, see CONTRIBUTING.md."
        )


def contents(value: Any) -> Any:
    """What an object without tensors holds, to be compared; ``None`` where it may hold some."""
    if isinstance(value, _PLAIN):
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
    if not isinstance(value, _PLAIN | list | tuple | dict):
        return copy.deepcopy(value)
    if isinstance(value, list | tuple):
        made = [_copy(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _nan(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_nan(item) for item in value]
    return torch.full_like(value, float("nan"))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers and compiled parts of a model are afterwards what they were."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    indices = [d.index or 0 for d in devices if d.type == kind]
    # compiled parts would be compiled again, for what runs here
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(indices, device_type=kind), eager:
        yield


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


def signature_of(call: Call) -> Any:
    """Equal for calls whose traces are equal: shapes of tensors, masks and other settings.

    Masks, sizes and indices tell where a token is, and are compared by value.
    """
    found: list[Any] = []
    _sign("", call, found)
    return tuple(found)


def _sign(name: str, value: Any, found: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        found.append((name, tuple(value.shape), value.dtype, value.device))
        if not (value.is_floating_point() or value.is_complex()) and value.ndim > 1:
            found.append(value.cpu().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            _sign(f"{name}.{key}", item, found)
    elif isinstance(value, list | tuple):
        found.append((name, len(value)))
        for item in value:
            _sign(name, item, found)
    elif not isinstance(value, float):
        found.append((name, value if isinstance(value, _PLAIN) else contents(value)))
