"""Pipelines that edit pictures, kept small."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

EDITED = 32  # pixels of a picture that is edited


@contextlib.contextmanager
def small_pictures(pipe: Any) -> Any:
    """Pipelines that edit pictures bring them to a size of their own, of a million pixels."""
    module = sys.modules[_described(pipe).__module__]
    own = getattr(module, "calculate_dimensions", None)
    if own is None:
        yield
        return
    module.calculate_dimensions = lambda area, ratio: own(EDITED**2, ratio)
    try:
        yield
    finally:
        module.calculate_dimensions = own


def _described(pipe: Any) -> type:
    return next(cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers."))
