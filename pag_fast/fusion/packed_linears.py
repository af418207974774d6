"""Weights of linear layers that see the same input, joined into one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..sharing.plan import has_diffusers_hooks


def is_plain(module: Any) -> bool:
    """Whether ``module`` is a linear layer and nothing else: no adapter, quantizer or hook."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and not module.weight.is_inference()
        and not hasattr(module, "_hf_hook")
        and not has_diffusers_hooks(module)
        and module._compiled_call_impl is None
        and "forward" not in vars(module)
    )


class Joined:
    """One weight ``[sum of outputs, inputs]`` and one bias, of which the layers' own are views.

    The parameters stay the objects they are, with the values they have; only their memory moves
    next to each other, so nothing is held twice. What moves a parameter elsewhere (``pipe.to``, a
    LoRA that is merged) parts it again, which :meth:`intact` notices.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = list(linears)
        self.rows = [linear.out_features for linear in linears]
        self.weight = _join([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else _join(biases)

    @staticmethod
    def fits(linears: Sequence[Any]) -> bool:
        """Whether the layers can be joined."""
        if len(linears) < 2 or not all(map(is_plain, linears)):
            return False
        alike = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in linears}
        return len(alike) == 1 and len({id(x.weight) for x in linears}) == len(linears)

    def intact(self) -> bool:
        """Whether every layer still is what was joined, and its parameters still are views."""
        if not all(type(linear) is nn.Linear for linear in self.linears):
            return False
        parts = [(self.weight, [linear.weight for linear in self.linears])]
        if self.bias is not None:
            parts.append((self.bias, [linear.bias for linear in self.linears]))
        return all(_adjacent(views) and _same(whole, views[0]) for whole, views in parts)

    def part(self) -> None:
        """Give every parameter memory of its own again."""
        for linear in self.linears:
            for parameter in (linear.weight, linear.bias):
                if parameter is not None and _is_part(parameter):
                    parameter.data = parameter.data.clone()


def _join(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    first = parameters[0].data
    if _adjacent(parameters):
        # by another pipeline that has this model
        rows = sum(p.shape[0] for p in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([p.data for p in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + parameter.shape[0]]
        start += parameter.shape[0]
    return whole


def _adjacent(parameters: Sequence[torch.Tensor]) -> bool:
    first, end = parameters[0], parameters[0].storage_offset()
    storage = first.untyped_storage()._cdata
    for p in parameters:
        here = p.untyped_storage()._cdata == storage and p.storage_offset() == end
        if not (here and p.is_contiguous()):
            return False
        end += p.numel()
    return True


def _same(whole: torch.Tensor, first: torch.Tensor) -> bool:
    same = whole.untyped_storage()._cdata == first.untyped_storage()._cdata
    return same and whole.storage_offset() == first.storage_offset()


def _is_part(parameter: torch.Tensor) -> bool:
    return parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()
