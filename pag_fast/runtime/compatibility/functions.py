"""Functions that somebody has put in the place of torch's or diffusers', which modules call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn import functional

from .answers import UNKNOWN, Answer, Finding
from .origins import TRUSTED, foreign_function, package

# they compute each row's attention from that row alone
_KERNELS = frozenset(
    {
        "flash_attn",
        "flash_attn_interface",
        "sageattention",
        "sageattn3",
        "spas_sage_attn",
        "xformers",
    }
)
_FUNCTIONS = FunctionType, MethodType, partial
_ATTENTION = "scaled_dot_product_attention"


def code_of(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The globals of the code that runs in some modules: names of functions, among others."""
    names = {cls.__module__ for cls in set(map(type, modules))}
    found = [sys.modules[n] for n in sorted(names) if package(n) in TRUSTED and n in sys.modules]
    return [vars(module) for module in (functional, *found)]


def functions_in(code: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The functions by name, without those that compilers put there."""
    for names in code:
        for name, value in names.items():
            if isinstance(value, _FUNCTIONS) and not name.startswith("__"):
                yield name, value


def foreign_functions(code: Iterable[dict[str, Any]]) -> tuple[Finding, ...]:
    """A finding for each function in ``code`` whose own code is nobody's that is known."""
    found: dict[Finding, None] = {}
    for name, function in functions_in(code):
        who = foreign_function(function)
        if who:
            found[_finding(name, who)] = None
    return tuple(found)


def _finding(name: str, who: str) -> Finding:
    what = f"{name}() of {who}"
    perturbed = ""
    if name == _ATTENTION:
        perturbed = "; layers that are perturbed compute attention without it"
    if who in _KERNELS:
        return Finding(what, "", Answer.FINE, f"branches stay shared{perturbed}.")
    sentence = (
        f"{who} has replaced the function {name}(), and pag_fast does not know what that does to "
        "rows of other branches: every branch runs with rows of its own in every step, and no "
        f"weights are fused or kept{perturbed}. If it treats every "
        "row by itself, say so with pag_fast.runtime.compatibility.row_wise()."
    )
    return Finding(what, "", UNKNOWN, sentence)
