"""Descriptions of classes whose models are traced: what is written, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from ...processors.stock import PerturbedStockAttention
from ...sharing.layout import Layout
from ..description import Checkpoint, ModelDescription
from .structure import block_of


def traced_model(
    name: str,
    blocks: Sequence[str],
    attentions: Sequence[str],
    *,
    processors: Sequence[str] = (),
    checkpoints: Sequence[Checkpoint] = (),
) -> ModelDescription:
    """The description of a class of denoisers whose stock attention runs around our product.

    Args:
        name: of the class.
        blocks: attributes that hold its blocks, in execution order.
        attentions: attributes of a block that hold its attentions over image tokens, in order.
        processors: class names of the processors that may be displaced; empty: any.
        checkpoints: published weights.
    """
    return ModelDescription(
        name,
        PerturbedStockAttention,
        _not_traced,
        _not_traced,
        blocks={},
        layout=Layout(tuple(blocks), tuple(attentions)),
        replaces=frozenset(processors),
        checkpoints=tuple(checkpoints),
        is_traced=True,
    )


def _not_traced(model: Any, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} is traced in its first forward: patch its pipeline and call it."
    )


def source_of(model: Any, found: ModelDescription) -> str:
    """The text of a file for :mod:`pag_fast.models` that says what a trace has shown of a model.

    Raises:
        ValueError: the model has not been traced, or has attention outside of lists of blocks.
    """
    if found.traced is None or found.traced.trace is None:
        raise ValueError(f"{found.name} has not been traced: call its pipeline first.")
    names = found.traced.trace.names
    homes = {name: block_of(model, name) for name in names}
    if not all(homes.values()):
        lost = next(name for name, home in homes.items() if not home)
        raise ValueError(f"{lost} is in no list of blocks: describe {found.name} by hand.")
    blocks = list(dict.fromkeys(home.rpartition(".")[0] for home in homes.values()))
    attentions = list(dict.fromkeys(name[len(homes[name]) + 1 :] for name in names))
    kinds = sorted({type(model.get_submodule(name).processor).__name__ for name in names})
    return f'''"""``{found.name}``."""

from __future__ import annotations

from .traced.written import traced_model

DESCRIPTION = traced_model(
    "{found.name}",
    {_listed(blocks)},
    {_listed(attentions)},
    processors={_listed(kinds)},
)
'''


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
