"""Tiny pipelines are built once and copied: building one takes as long as a call of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import diffusers
import torch

_ATOMS = (type(None), bool, int, float, str, type, torch.dtype, torch.device)
_BY_ATTRIBUTE = (torch.nn.Module, diffusers.DiffusionPipeline)


def _tensor(x: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or vars(x) or not (x.is_leaf and whole):
        return copy.deepcopy(x, memo)
    made = x.detach().clone()
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(made, x.requires_grad)
    return made.requires_grad_(x.requires_grad)


def duplicate(x: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(x, memo)``, several times as fast for modules."""
    kind = type(x)
    if kind in _ATOMS:
        return x
    if kind in (dict, OrderedDict, set) and not x:
        return kind()
    if id(x) in memo:
        return memo[id(x)]
    # what is made goes into memo before it is filled: modules refer to each other in circles
    if isinstance(x, torch.Tensor):
        memo[id(x)] = made = _tensor(x, memo)
    elif kind in (dict, OrderedDict):
        memo[id(x)] = made = kind()
        for key, value in x.items():
            made[key] = duplicate(value, memo)
    elif kind is list:
        memo[id(x)] = made = []
        made.extend([duplicate(value, memo) for value in x])
    elif isinstance(x, _BY_ATTRIBUTE) or dataclasses.is_dataclass(kind):
        memo[id(x)] = made = kind.__new__(kind)
        inside = vars(made)
        for key, value in vars(x).items():
            inside[key] = duplicate(value, memo)
    else:
        made = copy.deepcopy(x, memo)
    return made


def made_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build`` whose calls return copies of what the first call with equal arguments made.

    The random numbers that follow are those that would follow ``build`` itself: the CPU's, so
    models on another device are built anew.
    """
    # with the arguments, so that what the key names stays alive
    kept: dict[str, tuple[Any, torch.Tensor, dict[str, Any]]] = {}
    signature = inspect.signature(build)

    @functools.wraps(build)
    def copied(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type != "cpu":
            return build(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        key = f"{sorted(arguments.items())} {torch.get_default_dtype()}"
        if key not in kept:
            made = build(*args, **kwargs)
            kept[key] = made, torch.get_rng_state(), arguments
        made, state, _ = kept[key]
        torch.set_rng_state(state)
        return duplicate(made, {})

    return copied
