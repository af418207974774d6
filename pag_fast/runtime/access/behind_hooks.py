"""What a denoiser is run on behind hooks of others that stand in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...sharing.arguments import version_of
from ...sharing.plan import argument_names
from ...sharing.replacement import Replacement
from ...sharing.rows import BranchState
from .instance_patch import Entry

Signature = list[tuple[Any, int]]


class BehindHooks(Replacement):
    """The denoiser's own forward, entered behind its pre-hooks.

    Which rows are equal was decided in front of them. A hook that hands on other arguments, or
    writes into these, has them compared again.

    Args:
        again: called with the arguments as they arrive, where they are not what was decided on.
    """

    def __init__(
        self, state: BranchState, module: nn.Module, again: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(state, module)
        self._again = again
        self._expected: Signature = []

    def expect(self, call: dict[str, Any]) -> None:
        """Note the arguments that rows were decided on."""
        self._expected = _signature(call)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(argument_names(self.module), args, strict=False)), **kwargs}
        now, before = _signature(call), self._expected
        self._expected = []
        if len(now) != len(before) or not all(
            # inference tensors, of version -1, do not tell
            a is b and version == own >= 0
            for (a, version), (b, own) in zip(now, before, strict=True)
        ):
            self._again(call)
        return self.run_original(args, kwargs)


def entries_behind(
    state: BranchState, denoiser: nn.Module, call: dict[str, Any], again: Callable[[Any], None]
) -> list[Entry]:
    """What goes on a denoiser for one forward, whose rows were decided on ``call``."""
    replacement = BehindHooks(state, denoiser, again)
    replacement.expect(call)
    return [(vars(denoiser), "forward", replacement)]


def _signature(call: dict[str, Any]) -> Signature:
    tensors = [x for x in tree_leaves(dict(sorted(call.items()))) if isinstance(x, torch.Tensor)]
    return [(x, version_of(x)) for x in tensors]
