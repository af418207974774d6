"""What a model's forwards leave in it, taken back: buffers, attributes, and what those hold.

A trace feeds a model NaN, and a comparison feeds it rows by themselves. A model that keeps
statistics, counts its calls or caches an output would keep what came of that for good.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# of a module, what torch, hooks and we ourselves have there: nothing that its forward keeps
_NOT_ITS_OWN = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_diffusers_hook",
    "_hf_hook",
    "_old_forward",
    "forward",
}
_PLAIN = bool | int | float | complex | str | bytes | None
# objects of these packages belong to everybody
_OF_OTHERS = (set(sys.stdlib_module_names) - {"types"}) | {"accelerate", "pag_fast", "torch"}
_DEEPEST = 4
# a kernel may write into a buffer without telling: small ones are copied at once
_SMALL = 2**20


class _Writes(TorchDispatchMode):
    """Copies memory before an operator writes into it."""

    # attention of torch's own may be an operator of a higher order
    supports_higher_order_operators = True

    def __init__(self, owner: Preserved) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            given = dict(zip([x.name for x in schema.arguments], args, strict=False)) | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._owner.about_to_write(given.get(argument.name))
        return func(*args, **kwargs)


class _Holder:
    """Attributes, or a collection, that things are put into; ``skips`` are keys of others."""

    def __init__(self, name: str, held: Any, skips: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.held = held
        self.skips = skips
        self.before = self._now()

    def _now(self) -> Any:
        if not isinstance(self.held, dict):
            return self.held.copy()
        return {key: x for key, x in self.held.items() if key not in self.skips}

    def differing(self, *, exactly: bool = False) -> list[str]:
        """Names of what is another thing than before; unless ``exactly``, of another value."""
        before, now = self.before, self._now()
        if isinstance(now, dict):
            either = [*before, *(key for key in now if key not in before)]
            other = [
                key
                for key in either
                if (key in before) != (key in now)
                or not _same(now[key], before[key], exactly=exactly)
            ]
            return [f"{self.name}.{key}".lstrip(".") for key in other]
        same = len(now) == len(before) and all(
            _same(x, y, exactly=exactly) for x, y in zip(now, before, strict=True)
        )
        return [] if same else [self.name]

    def refill(self) -> None:
        """Have it hold what it held."""
        held = self.held
        if isinstance(held, dict):
            for key in [key for key in self._now() if key not in self.before]:
                del held[key]
            held.update(self.before)
        else:
            held.clear()
            held.update(self.before) if isinstance(held, set) else held.extend(self.before)


class Preserved:
    """What a model holds now, to be given back.

    Args:
        given: arguments of a forward, which it may write into.
    """

    def __init__(self, model: nn.Module, given: Any = ()) -> None:
        # everything that can be told apart from what is there later, with a copy of it
        self._holders: list[_Holder] = []
        self._tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._places: dict[int, tuple[str, torch.UntypedStorage]] = {}
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._noted: set[int] = set()
        modules = dict(model.named_modules())
        # offloading puts other tensors in their place, and takes them away
        hooks = ("_hf_hook", "_diffusers_hook")
        self._moves = any(hook in vars(m) for m in modules.values() for hook in hooks)
        self._note_given(given)
        for name, module in modules.items():
            for key, x in module._parameters.items():
                self._place(f"{name}.{key}".lstrip("."), x)
            self._note_attributes(name, vars(module), 0)

    def about_to_write(self, value: Any) -> None:
        """Copy what the tensors in ``value`` lie in, where it is the model's."""
        if isinstance(value, list | tuple):
            for item in value:
                self.about_to_write(item)
        elif isinstance(value, torch.Tensor):
            at = _address(value)
            if at in self._places and at not in self._copies:
                self._copies[at] = self._places[at][1].clone()

    def changes(self) -> tuple[str, ...]:
        """Names of what is not what it was."""
        found = [
            self._places[at][0] for at, copy in self._copies.items() if self._differs(at, copy)
        ]
        found += [name for name, x, before in self._tensors if _is_elsewhere(x, before)]
        for holder in self._holders:
            found += holder.differing()
        return tuple(dict.fromkeys(found))

    def restore(self) -> None:
        """Give everything back."""
        for holder in self._holders:
            if holder.differing(exactly=True):
                holder.refill()
        for _, x, before in self._tensors:
            if _is_elsewhere(x, before):
                x.data = before
        for at, copy in self._copies.items():
            if self._differs(at, copy):
                self._places[at][1].copy_(copy)

    def _differs(self, at: int, copy: torch.UntypedStorage) -> bool:
        return not torch.equal(_bytes(self._places[at][1]), _bytes(copy))

    # ---- noting ----

    def _note_attributes(self, name: str, own: Any, depth: int) -> None:
        buffers = own.get("_buffers")
        kept = _Holder(name, own, _NOT_ITS_OWN)
        self._holders.append(kept)
        values = kept.before
        if isinstance(buffers, dict):
            if not self._moves:
                self._holders.append(_Holder(name, buffers))
            values = values | buffers
        for key, value in values.items():
            self._note(f"{name}.{key}".lstrip("."), value, depth + 1)

    def _note(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self._place(name, value, keeps=True)
            return
        # objects are noted once, as they may hold each other
        if isinstance(value, _PLAIN) or depth > _DEEPEST or id(value) in self._noted:
            return
        self._noted.add(id(value))
        if isinstance(value, tuple):
            items = [(name, item) for item in value]
        elif isinstance(value, dict):
            items = [(f"{name}.{key}", item) for key, item in value.items()]
            self._holders.append(_Holder(name, value))
        elif type(value) in (list, set, deque):
            items = [(name, item) for item in value]
            self._holders.append(_Holder(name, value))
        else:
            if _keeps(value):
                self._note_attributes(name, vars(value), depth)
            return
        for key, item in items:
            self._note(key, item, depth + 1)

    def _note_given(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._place("an argument", value)
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._note_given(item)

    def _place(self, name: str, x: torch.Tensor | None, *, keeps: bool = False) -> None:
        at = 0 if x is None else _address(x)
        if x is None or not at:
            return
        storage = x.untyped_storage()
        self._places.setdefault(at, (name, storage))
        if keeps and not self._moves:
            self._tensors.append((name, x, x.detach()))
            if storage.nbytes() <= _SMALL and at not in self._copies:
                self._copies[at] = storage.clone()


@contextmanager
def preserved(model: nn.Module, given: Any = ()) -> Iterator[Preserved]:
    """A model's buffers and attributes, and what is given to it, are afterwards what they were."""
    held = Preserved(model, given)
    try:
        with _Writes(held):
            yield held
    finally:
        held.restore()


@contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Random numbers are afterwards drawn as if nothing had been; compiled parts run eagerly."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    indices = [d.index or 0 for d in devices if d.type == kind]
    # compiled parts would be compiled again, for what runs here
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(indices, device_type=kind), eager:
        yield


@contextmanager
def undisturbed(model: nn.Module, given: Any = ()) -> Iterator[Preserved]:
    """A model, its random numbers and what is given to it are afterwards what they were."""
    with random_numbers_kept(model), preserved(model, given) as held:
        yield held


def _keeps(value: Any) -> bool:
    """Whether an object may be one that a model keeps something in."""
    if isinstance(value, type | nn.Module | ModuleType | FunctionType | MethodType):
        return False
    package = type(value).__module__.partition(".")[0]
    if type(value).__module__.startswith("diffusers.hooks"):
        return False
    known = isinstance(value, SimpleNamespace) or package not in _OF_OTHERS
    return known and isinstance(getattr(value, "__dict__", None), dict)


def _address(x: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none, or does not tell."""
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _is_elsewhere(x: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether other memory was put into a tensor."""
    return x.device == before.device and x.data_ptr() != before.data_ptr()


def _same(x: Any, y: Any, *, exactly: bool = False) -> bool:
    """Whether two things are one, or, unless ``exactly``, have the same value."""
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, _PLAIN):
        return bool(x == y) or (x != x and y != y)
    if exactly:
        return False
    if isinstance(x, torch.Tensor):
        alike = x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
        return alike and bool(((x == y) | ((x != x) & (y != y))).all())
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    return isinstance(x, dict) and x.keys() == y.keys() and all(_same(x[k], y[k]) for k in x)
