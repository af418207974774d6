"""Counting launches: of Triton kernels in the interpreter, and of everything else by dispatch."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pag_fast.analysis.kernel_counts import is_launch
from pag_fast.fusion import Fusion
from pag_fast.models.registry import fusable_processors
from pag_fast.runtime.compatibility import row_wise


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched in a test, in order; a test that launches none fails."""
    from pag_fast_kernels.launch import INTERPRETED
    from triton.compiler import CompiledKernel
    from triton.runtime import interpreter

    # every launch of a binary asks for its metadata, prepared ones included
    owner, method = (
        (interpreter.GridExecutor, "__call__")
        if INTERPRETED
        else (CompiledKernel, "launch_metadata")
    )
    names = []
    run = getattr(owner, method)

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__ if INTERPRETED else self.name)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    yield names
    assert names, "the test has launched no kernel"


@row_wise
class CountOps(TorchDispatchMode):
    """Counts the ops that would launch at least one kernel: views and allocations are none.

    An op of ours counts as nothing here; its kernels are counted by :func:`launches`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if is_launch(func) and not name.startswith("pag_fast::"):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def fusion_of(model, *args, **options):
    """A :class:`Fusion` with what the model's description says of its processors."""
    return Fusion(model, *args, fusable=fusable_processors(model), **options)
