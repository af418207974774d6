"""Uncond ahead of its time: on a rank of its own, while another one runs cond.

Where uncond is a call of its own, the loop asks for it when cond is done. What the two forwards of
a step have in common, and what is uncond's own, shows in the first step, which runs one after the
other. From the second on a rank runs the uncond forward that is going to be asked for. If another
one is, that runs everywhere, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...sharing.arguments import latents_of, version_of
from ..access.forwards import Call
from ..access.frames import nobody_writes

# some loops make these anew for each forward: compared by value, in the first step
_OF_A_STEP = ("timestep", "guidance")


class Ahead:
    """What one call of a pipeline knows of its uncond forwards.

    Args:
        tell: is told why uncond cannot run ahead.

    Attributes:
        held: what uncond's forward returns in this step, where it has run already.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.held: Any = None
        self._tell = tell
        self._is_off = False
        self._cond: Call = {}
        self._uncond: Call | None = None
        self._common: set[str] = set()
        self._made_anew: set[str] = set()
        self._versions: dict[str, int] = {}

    def arguments(self, cond: Call) -> Call | None:
        """Those of the uncond forward that follows cond's with ``cond``, if that is known."""
        if self.held is not None:  # nobody has asked: CFG is off, or over
            self.held = self._uncond = None
        self._cond = dict(cond)
        if self._is_off or self._uncond is None or not self._common <= cond.keys():
            return None
        found = {n: cond[n] if n in self._common else x for n, x in self._uncond.items()}
        self._versions = _versions(found)
        return found

    def served(self, call: Call) -> Any:
        """What an uncond forward with the arguments ``call`` returns; ``None``: it has to run."""
        held, self.held = self.held, None
        if held is None:
            self._learn(call)
            return None
        assert self._uncond is not None
        others = [
            name
            for name in call.keys() | self._uncond.keys()
            if name not in self._made_anew and not self._is_foreseen(name, call)
        ]
        if not others:
            return held
        self._is_off = True
        self._tell(
            f"uncond does not run ahead on a rank of its own: its {', '.join(sorted(others))} was "
            "another one than in the step before, and it runs on every rank"
        )
        return None

    def _is_foreseen(self, name: str, call: Call) -> bool:
        source = self._cond if name in self._common else self._uncond
        if source is None or name not in call or name not in source:
            return False
        x = call[name]
        if isinstance(x, torch.Tensor):
            version = version_of(x)
            if version != self._versions.get(name) or (version < 0 and not nobody_writes()):
                return False
        return _alike(x, source[name])

    def _learn(self, call: Call) -> None:
        """What uncond's forward has in common with cond's, of a step in which both ran."""
        cond = self._cond
        self._common = {n for n, x in call.items() if n in cond and _alike(x, cond[n])}
        self._made_anew = {
            n
            for n in _OF_A_STEP
            if n in call and n in cond and n not in self._common and _equal(call[n], cond[n])
        }
        self._common |= self._made_anew
        shared = cond and _alike(latents_of(call), latents_of(cond))
        same_kind = call.get("return_dict") == cond.get("return_dict")
        self._uncond = dict(call) if shared and same_kind else None

    def forget(self) -> None:
        """The call is over."""
        self.held = self._uncond = None
        self._cond = {}


def _versions(call: Call) -> dict[str, int]:
    return {n: version_of(x) for n, x in call.items() if isinstance(x, torch.Tensor)}


def _alike(x: Any, other: Any) -> bool:
    """Whether two arguments are the same object, the same memory, or equal words and numbers."""
    if x is other:
        return True
    if type(x) is not type(other):
        return False
    if isinstance(x, torch.Tensor):
        return (
            x.data_ptr() == other.data_ptr()
            and x.shape == other.shape
            and x.stride() == other.stride()
            and x.dtype == other.dtype
        )
    if isinstance(x, list | tuple):
        return len(x) == len(other) and all(map(_alike, x, other))
    if isinstance(x, dict):
        return x.keys() == other.keys() and all(_alike(x[key], other[key]) for key in x)
    return isinstance(x, bool | int | float | str) and x == other


def _equal(x: Any, other: Any) -> bool:
    both = isinstance(x, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and x.shape == other.shape and torch.equal(x, other)
