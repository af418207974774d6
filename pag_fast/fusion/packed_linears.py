"""Weights of linear layers that see the same input, packed into one matrix.

Every parameter keeps a storage of its own, of its own size, whose memory is a part of the whole's:
whatever saves, copies or pickles a model sees the tensors it would see without us.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ..sharing.plan import has_diffusers_hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# vectorised loads of matrix products, and their choice of a kernel, want addresses like these
_ALIGNMENT = 16


def is_untouched(module: nn.Module) -> bool:
    """Whether a module runs as its class is written: no hook, no replaced or compiled forward."""
    own = vars(module)
    return (
        "forward" not in own
        and not any(own[hooks] for hooks in _HOOKS)
        and "_hf_hook" not in own
        and not has_diffusers_hooks(module)
        and own.get("_compiled_call_impl") is None
    )


def is_plain(module: Any) -> bool:
    """Whether ``module`` is a linear layer and nothing else: no adapter, quantizer or hook."""
    if type(module) is not nn.Linear or not is_untouched(module):
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or weight.ndim != 2:
        return False
    return _is_plain_tensor(weight) and (bias is None or _is_plain_tensor(bias))


def _is_plain_tensor(parameter: Any) -> bool:
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is torch.Tensor
        and not parameter.is_inference()
        and parameter.layout is torch.strided
        and parameter.dtype in _DTYPES
        and parameter.is_contiguous()
    )


class Whole:
    """The memory of several parameters of one kind, in a row.

    Each parameter's storage is a slice of this one's, which it keeps alive. Parameters on the meta
    device have no memory: there it stands beside them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.tensor = torch.cat([p.data for p in parameters])
        if self.tensor.is_meta:  # launches are counted there; there is no memory to share
            return
        storage, size = self.tensor.untyped_storage(), self.tensor.element_size()
        parts, start = [], 0
        for p in parameters:
            end = start + p.numel() * size
            empty = torch.empty(0, dtype=p.dtype, device=p.device)
            parts.append(empty.set_(storage[start:end], 0, p.shape, p.stride()))
            start = end
        for p, part in zip(parameters, parts, strict=True):
            p.data = part

    def holds(self, parameters: Sequence[Any]) -> bool:
        """Whether these are the parameters of this memory, one after the other, as packed."""
        whole = self.tensor
        if whole.is_meta:
            return all(p.is_meta and p.dtype == whole.dtype for p in parameters)
        address, rows = whole.data_ptr(), 0
        for p in parameters:
            alike = p.dtype == whole.dtype and p.device == whole.device
            if not alike or p.data_ptr() != address or p.shape[1:] != whole.shape[1:]:
                return False
            if not p.is_contiguous():
                return False
            address += p.numel() * p.element_size()
            rows += p.shape[0]
        return rows == whole.shape[0]

    def contains(self, parameter: Any) -> bool:
        """Whether a parameter's memory is a part of this."""
        start = self.tensor.data_ptr()
        end = start + self.tensor.numel() * self.tensor.element_size()
        if self.tensor.is_meta or self.tensor.device != parameter.device:
            return False
        return start <= parameter.data_ptr() < end


# two pipelines with one model use the same memory, rather than move its weights in turns
_WHOLES: WeakValueDictionary[tuple[torch.device, int], Whole] = WeakValueDictionary()


def _whole(parameters: Sequence[nn.Parameter]) -> Whole:
    first = parameters[0]
    if first.is_meta:
        return Whole(parameters)
    found = _WHOLES.get((first.device, first.data_ptr()))
    if found is not None and found.holds(parameters):
        return found
    made = Whole(parameters)
    _WHOLES[made.tensor.device, made.tensor.data_ptr()] = made
    return made


class PackedLinears:
    """Linear layers that are computed as one, with a weight ``[sum of outputs, inputs]``.

    The parameters stay the objects they are, with the values they have; only their memory moves
    next to each other, so nothing is held twice. What moves a parameter elsewhere (``pipe.to``, a
    LoRA that is merged) takes it out again, which :meth:`intact` notices.

    Attributes:
        weight, bias: of all layers; ``None`` while they are apart.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = list(linears)
        self.rows: list[int] = []
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._packed: list[tuple[Whole, list[nn.Parameter]]] = []

    @property
    def joined(self) -> bool:
        return self.weight is not None

    def fits(self, shared: frozenset[int] = frozenset()) -> bool:
        """Whether the layers can be joined.

        Args:
            shared: addresses of memory that more than one parameter of the model has.
        """
        linears = self.linears
        if len(linears) < 2 or not all(map(is_plain, linears)):
            return False
        alike = {(x.weight.shape[1], x.weight.dtype, x.weight.device, x.bias is None)
                 for x in linears} | {(x.weight.shape[1], x.bias.dtype, x.bias.device, False)
                 for x in linears if x.bias is not None}  # fmt: skip
        if len(alike) != 1:
            return False
        for parameters in self._parameters():
            if parameters[0].is_meta:
                continue
            addresses = {p.data_ptr() for p in parameters}
            if len(addresses) < len(parameters) or addresses & shared:
                return False
            if not all(map(_owns_its_memory, parameters)):
                return False
            sizes = [p.numel() * p.element_size() for p in parameters]
            # where a slice begins is where those before it end
            if any(size % _ALIGNMENT for size in sizes[:-1]) or not all(sizes):
                return False
        return True

    def join(self) -> None:
        """Move the parameters next to each other, unless they are."""
        # tensors made in inference mode could not be parameters of a model that is trained later
        with torch.inference_mode(False), torch.no_grad():
            self._packed = [(_whole(parameters), parameters) for parameters in self._parameters()]
            self.rows = [linear.weight.shape[0] for linear in self.linears]
            self.weight = self._packed[0][0].tensor
            self.bias = self._packed[1][0].tensor if len(self._packed) > 1 else None

    def intact(self) -> bool:
        """Whether the layers' parameters still are what was joined."""
        if not self.joined or any(x._parameters.get("weight") is None for x in self.linears):
            return False
        now = self._parameters()
        return len(now) == len(self._packed) and all(
            None not in parameters and whole.holds(parameters)
            for (whole, _), parameters in zip(self._packed, now, strict=True)
        )

    def split(self) -> None:
        """Give every parameter that still lies in the whole memory of its own, and let go of it."""
        slots = [p for x in self.linears for p in x._parameters.values() if p is not None]
        with torch.inference_mode(False), torch.no_grad():
            for whole, parameters in self._packed:
                for p in dict.fromkeys([*parameters, *slots]):
                    if type(p.data) is torch.Tensor and whole.contains(p):
                        p.data = p.data.clone()
        self.weight = self.bias = None
        self._packed = []

    def _parameters(self) -> list[list[Any]]:
        """The weights of all layers and, where there are any, the biases."""
        found = [[x._parameters.get(name) for x in self.linears] for name in ("weight", "bias")]
        return [parameters for parameters in found if any(p is not None for p in parameters)]


def _owns_its_memory(parameter: nn.Parameter) -> bool:
    """Whether nothing else lies in a parameter's storage, and no other process sees it."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size():
        return False
    # a tensor on a GPU always says that it is shared
    elsewhere = parameter.device.type == "cpu" and (parameter.is_shared() or parameter.is_pinned())
    return not elsewhere and storage.filename is None


def shared_memory(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Addresses of the memory that more than one parameter or buffer of a model has."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None or tensor.is_meta or type(tensor.data) is not torch.Tensor:
                    continue
                address = tensor.data_ptr()
                (twice if address in seen else seen).add(address)
    return frozenset(twice)
