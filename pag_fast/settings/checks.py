"""Checks of options that several modules make."""

from __future__ import annotations

from typing import Any


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float; ``True`` and ``False`` are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
