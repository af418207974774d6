"""Layer names as a user writes them; :mod:`pag_fast.models.layer_names` says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

Layers = str | int | Sequence[str | int]


def as_list(layers: Any) -> list[str | int]:
    """``layers`` as the list of its items.

    Raises:
        ValueError: neither a name, an integer nor a sequence of them; nothing in it; a name that
            is empty.
    """
    if isinstance(layers, str | Integral):
        return [_item(layers)]
    # a set and a dict have no order to rely on, a generator can be read once
    if not isinstance(layers, Sequence) or isinstance(layers, bytes | bytearray | memoryview):
        raise ValueError(
            "layers must be a name, an integer, or a list of them, e.g. 'mid', 13 or "
            f"['blocks.13']; got {layers!r}."
        )
    if not layers:
        raise ValueError("layers is empty: name at least one layer, e.g. 'mid' or 'blocks.13'.")
    return [_item(item) for item in layers]


def _item(item: Any) -> str | int:
    if isinstance(item, str):
        if not item.strip():
            raise ValueError(
                f"A layer's name is empty: {item!r} would match every layer. Name some, e.g. 'mid' "
                "or 'blocks.13'."
            )
        return item
    if isinstance(item, Integral) and not isinstance(item, bool):
        return int(item)
    raise ValueError(
        f"Layers are strings or integers, e.g. 'mid', 'blocks.13' or 13; got {item!r}."
    )
