"""Residuals of ControlNets: computed in the main pass, handed out again in the perturbed one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch

from .inputs import equal
from .inputs import rows_of as rows_of_inputs

if TYPE_CHECKING:
    from .record import Entry

# entries of a batch that are no input of the model, or have another name there
_OTHERWISE = ("c_concat", "c_crossattn", "transformer_options", "control")

Residuals = dict[str, list[torch.Tensor | None]]


def rows_of(residuals: Any, rows: slice, batch: int) -> Residuals | None:
    """``rows`` of every residual; those that stand for all rows stay whole.

    The lists are copied because UNets pop what they use.
    """
    if residuals is None:
        return None
    return {
        name: [
            tensor if tensor is None or tensor.shape[0] != batch else tensor[rows]
            for tensor in tensors
        ]
        for name, tensors in residuals.items()
    }


class Recorded:
    """Stands in for a ControlNet: it returns what the main pass received from it.

    Args:
        real: the ControlNet, asked where an entry turns out not to be recorded.
        entries: the entries of this step, by ``uuid``.
        rows: pictures in the batch.
    """

    def __init__(self, real: Any, entries: dict[Hashable, Entry], rows: int) -> None:
        self.real, self.entries, self.rows = real, entries, rows

    def get_control(
        self, x: torch.Tensor, t: Any, cond: Any, batched: int, options: dict[str, Any]
    ) -> Residuals | None:
        """The residuals of the entries in ``options["uuids"]``, in their order."""
        kept = [self.entries.get(uuid) for uuid in options["uuids"]]
        named = {"x": x, "t": t, "concat": cond.get("c_concat"), "cross": cond.get("c_crossattn")}
        named |= {name: value for name, value in cond.items() if name not in _OTHERWISE}
        known = [
            entry.control
            for i, entry in enumerate(kept)
            if entry is not None and entry.control is not None and self._again(entry, i, named)
        ]
        alike = all(_structure(one) == _structure(known[0]) for one in known)
        if len(known) < len(kept) or not alike or x.shape[0] != self.rows * len(kept):
            return self.real.get_control(x, t, cond, batched, options)
        first = known[0]
        return {name: [_joined(known, name, i) for i in range(len(first[name]))] for name in first}

    def _again(self, entry: Entry, i: int, named: dict[str, Any]) -> bool:
        """Whether the ``i``-th entry of a batch is that of the main pass; else it is asked anew."""
        if entry.spoiled is not None:
            return False
        rows = slice(i * self.rows, (i + 1) * self.rows)
        now = rows_of_inputs(named, rows, named["x"].shape[0])
        return not entry.valued or equal(entry.inputs, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def _structure(residuals: Residuals) -> dict[str, list[bool]]:
    return {name: [tensor is None for tensor in tensors] for name, tensors in residuals.items()}


def _joined(known: list[Residuals], name: str, i: int) -> torch.Tensor | None:
    parts = [residuals[name][i] for residuals in known]
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    # one that stands for all rows is the same tensor in every entry
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return torch.cat(tensors)


def stand_ins(cond: list[dict[str, Any]], entries: dict[Hashable, Entry], rows: int) -> list[Any]:
    """``cond`` with a stand-in for each ControlNet whose residuals this step has recorded.

    Entries of one ControlNet get one stand-in, so that they may go into one batch as before.
    """
    made: dict[int, Recorded] = {}
    out: list[Any] = []
    for one in cond:
        real, entry = one.get("control"), entries.get(one["uuid"])
        if real is not None and entry is not None and entry.control is not None:
            stand_in = made.setdefault(id(real), Recorded(real, entries, rows))
            one = {**one, "control": stand_in}
        out.append(one)
    return out
