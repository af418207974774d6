"""Layer names as a user writes them; :mod:`pag_fast.models.layer_names` says what they mean."""

from __future__ import annotations

from collections.abc import Sequence

Layers = str | int | Sequence[str | int]


def as_list(layers: Layers) -> list[str | int]:
    """``layers`` as the list of its items.

    Raises:
        ValueError: an empty list, or an item that is neither text nor an integer.
    """
    items = [layers] if isinstance(layers, str | int) else list(layers)
    if not items:
        raise ValueError("layers is empty: name at least one layer, e.g. 'mid' or 'blocks.13'.")
    for item in items:
        if not isinstance(item, str | int) or isinstance(item, bool):
            raise ValueError(
                f"Layers are strings or integers, e.g. 'mid', 'blocks.13' or 13; got {item!r}."
            )
    return items
