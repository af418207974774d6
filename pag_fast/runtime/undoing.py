"""Undoing that goes on when a part of it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def undo_all(*steps: Callable[[], object]) -> None:
    """Run every step, whatever the others do; the first error is the one that is raised."""
    first: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def undo_after_error(*steps: Callable[[], object]) -> None:
    """As :func:`undo_all`, where an error is on its way already: that one is the first."""
    for step in steps:
        try:
            step()
        except BaseException:
            continue


def free_models(pipe: Any) -> None:
    """What loops that return early forget: caches are reset, and models offloaded."""
    try:
        pipe.maybe_free_model_hooks()
    except ValueError:  # of a class with modules that are not in its __init__
        if getattr(pipe, "_all_hooks", None):
            raise
