"""Whose place processors of ours may take: they repeat the arithmetic of those that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import PerturbedProcessor


def check_processors(
    attentions: Mapping[str, Any], known: frozenset[str], *, strict: bool = False
) -> None:
    """Raises ValueError for attentions whose processors do what ours would not.

    Args:
        known: class names of the processors whose arithmetic ours repeats.
        strict: diffusers' own alone. Without it ours runs the processor that it displaces, and none
            known means any.
    """
    if not known and not strict:
        return
    for name, attention in attentions.items():
        cls = type(attention.processor)
        # every forward comes here: no calls
        if cls.__name__ in known and (not strict or cls.__module__[:10] == "diffusers."):
            continue
        if issubclass(cls, PerturbedProcessor):
            continue
        these = " or ".join(sorted(x for x in known if not x.startswith("PAG")))
        raise ValueError(
            f"{name} runs {cls.__name__}, whose arithmetic pag_fast does not know: choose layers "
            f"with {these}, or unload the adapter that has put it there."
        )
