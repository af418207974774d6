"""Checks of options that several modules make: numbers of every kind, and what can be pickled."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal
from numbers import Integral, Real
from typing import Any


def number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    infinite: bool = False,
) -> float:
    """``value`` as a float: a finite real number of any type, from ``least`` to ``most``.

    Python's and NumPy's numbers, fractions and decimals, and 0-d tensors and arrays are taken.
    Truth values are no numbers. ``infinite`` takes infinity too, if ``most`` does.

    Raises:
        ValueError: anything else; the sentence begins with ``name``.
    """
    plain = _plain(value)
    if plain is not None and least <= plain <= most and (infinite or math.isfinite(plain)):
        return float(plain)
    finite = ", and finite" if most == math.inf and not infinite else ""
    raise ValueError(f"{name} must be a number{_limits(least, most)}{finite}; got {value!r}.")


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """``value`` as an int: a whole number of any integer type, from ``least`` to ``most``.

    Raises:
        ValueError: anything else; the sentence begins with ``name``.
    """
    plain = _plain(value)
    if not isinstance(plain, int) or plain < least or (most is not None and plain > most):
        limits = _limits(least, math.inf if most is None else most)
        raise ValueError(f"{name} must be a whole number{limits}; got {value!r}.")
    return plain


def edge(name: str, value: Any) -> int | float:
    """A position as an int, or a fraction as a float, of any number type; never negative.

    Raises:
        ValueError: anything else; the sentence begins with ``name``.
    """
    as_float = number(name, value, least=0.0)
    plain = _plain(value)
    return plain if isinstance(plain, int) else as_float


def switch(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}.")


def _limits(least: float, most: float) -> str:
    if least == -math.inf:
        return ""
    if most < math.inf:
        return f" from {least:g} to {most:g}"
    return f" of at least {least:g}"


def _plain(value: Any) -> int | float | None:
    """``value`` as Python's int or float; ``None`` where it is no real number, or NaN."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        # dates and time spans of NumPy turn into integers, too
        if getattr(getattr(value, "dtype", None), "kind", "f") in "mM":
            return None
        try:
            value = value.item()
        except (RuntimeError, ValueError, TypeError):  # of the meta device: it has no value
            return None
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        # any integer stays exact: a seed has more digits than a float
        plain = int(value) if isinstance(value, Integral) else float(value)
        # a decimal too large for a float is no infinity
        lost = math.isinf(plain) and value != plain
        return None if lost or math.isnan(plain) else plain
    except (OverflowError, ValueError, TypeError):
        return None


class Settings:
    """Base of frozen dataclasses of options: pickled whole, or with a sentence of what cannot be.

    Copies are the object itself, as nobody can change it.
    """

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(self)
        return dict(vars(self))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


def check_picklable(settings: Any) -> None:
    """Raises ValueError naming the option of ``settings``, an object, that cannot be pickled."""
    for name, value in vars(settings).items():
        try:
            pickle.dumps(value)
        except ValueError as error:
            # settings inside of settings: the innermost sentence names the option
            raise ValueError(f"{name}: {error}") from error
        except Exception as error:
            raise ValueError(
                f"{name}={value!r} cannot be pickled ({type(error).__name__}), and with it neither "
                f"a {type(settings).__name__} nor a pipeline patched with it: use a function that "
                "a module defines by name instead of a lambda or a local function, or unpatch the "
                "pipeline first."
            ) from error
