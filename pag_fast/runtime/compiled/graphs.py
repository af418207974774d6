"""Graphs of a model's forwards: from the second of a kind on, launched again without Python.

In eager mode a small batch waits for Python: a step is hundreds of launches of 10 to 25 µs each. A
graph launches all of them at once. It holds addresses and numbers, so it is good for one call of a
pipeline, and only as long as everything that its forward has read is what it was: the rows of each
branch, shapes, settings, weights and adapters, what was kept of the conditioning. Anything else is
another key, and runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ...sharing.arguments import version_of
from ...sharing.conditioning_cache import Invariant
from ...sharing.plan import is_compiled
from ...sharing.rows import BranchState
from ...sharing.weight_signature import WeightSignature
from ..access.forwards import Call, Forward
from ..access.instance_patch import InstancePatch
from ..compatibility.findings import Findings
from .capture import Capture, NotCapturable, Replay

if TYPE_CHECKING:
    from ..basic_state import BasicState

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
# of one call: passes, rows with and without the perturbed branch
_MOST = 8


@dataclass
class _Graph:
    """One recorded forward.

    Attributes:
        replay: launches it.
        out: where its outputs are after that.
        inputs: the memory that it reads its arguments from, in the order of their leaves.
        filled: what was copied there last, and its version; ``None``: copy it again.
        clock: the memory of the number of the step.
        entered: how many perturbed layers it comes through.
        kept: what it reads of earlier forwards, with versions.
        holds: what has to stay alive.
    """

    replay: Replay
    out: Any
    inputs: list[torch.Tensor | None]
    filled: list[tuple[Any, int] | None]
    clock: torch.Tensor | None
    entered: int
    kept: list[tuple[torch.Tensor, int]]
    holds: Any


class Graphs:
    """The graphs of one model's forwards in one call of a pipeline.

    Args:
        patch: whose counters are told.
        capture: records forwards.
        state: of the model, as what is put on it reads it.
        invariants: what hands out outputs of earlier forwards.
        modules: every model that runs in a forward.
    """

    def __init__(
        self,
        patch: BasicState,
        capture: Capture,
        state: BranchState,
        invariants: Iterable[Invariant],
        modules: Iterable[nn.Module],
    ) -> None:
        self.patch = patch
        self.capture = capture
        self.state = state
        self._invariants = list(invariants)
        self._models = list(modules)
        inner = list(dict.fromkeys(chain.from_iterable(m.modules() for m in self._models)))
        self._owns = [vars(module) for module in inner]
        self._inner = inner
        # an IP-Adapter's scales are changed in place
        processors: list[Any] = [getattr(module, "processor", None) for module in inner]
        self._settings = [vars(p) for p in processors if getattr(p, "__dict__", None)]
        self._weights = WeightSignature(self._models)
        self._number = -1
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Graph] = {}
        self._refused = ""

    def forget(self) -> None:
        """Free everything."""
        self._graphs.clear()
        self._seen.clear()

    def run(
        self,
        forward: Forward,
        patch: InstancePatch,
        states: tuple[BranchState, ...],
        call: Call,
        found: Findings,
    ) -> Any:
        """A forward on ``call`` with ``patch`` on its model, from a graph where there is one."""

        def run(arguments: Call) -> Any:
            return forward.run(lambda: patch, states, arguments)

        reason = self._refused or self._reason(found)
        if reason:
            self.forget()
            self.patch.fall_back(f"no graphs: {reason}")
        leaves, spec = tree_flatten(call)
        key = None if reason else self._key(leaves, spec, patch)
        if key is None:
            return run(call)
        self._drop_outdated()
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen or len(self._graphs) >= _MOST:
                self._seen.add(key)
                return run(call)
            try:
                graph = self._captured(run, leaves, spec, patch)
            except NotCapturable as error:
                self.forget()
                self._refused = str(error)
                self.patch.fall_back(f"no graphs: {self._refused}")
            if graph is None:
                self._seen.discard(key)
                # what was begun counts as another forward
                self.state.step += 1
                return run(call)
            self._graphs[key] = graph
        return self._replayed(graph, leaves)

    # ---- when ----

    def _reason(self, found: Findings) -> str:
        """Why this forward has to run as it is written, in words, if it has."""
        for item in found.items:
            if item.answer.value:
                return f"{item.what} would not run in them"
        if any(map(any, map(_HOOKS, self._owns))) or any("forward" in own for own in self._owns):
            return "hooks and replaced forwards would not run in them"
        if any(map(is_compiled, self._inner)):
            return "what is compiled launches graphs of its own"
        if torch.is_grad_enabled():
            return "gradients are recorded as a model runs"
        if is_in_torch_dispatch_mode():
            return "a dispatch mode watches every operation"
        return ""

    def _key(self, leaves: list[Any], spec: Any, patch: InstancePatch) -> Any:
        """Equal for forwards that launch the same; ``None``: that cannot be told."""
        described: list[Any] = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                if type(x) is not torch.Tensor:
                    return None
                described.append((x.shape, x.stride(), x.dtype, x.device))
            elif isinstance(x, _PLAIN):
                described.append((type(x), x))
            else:
                return None
        state = self.state
        device = self._device(leaves)
        return (
            tuple(described),
            repr(spec),
            id(patch),
            (state.context, state.slabs, state.epoch, state.num_contexts, state.num_image),
            (state.size, state.clock is None),
            (torch.is_autocast_enabled(device.type), torch.is_inference_mode_enabled()),
            (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
            torch.are_deterministic_algorithms_enabled(),
            self.capture.stream(),
            repr([[_plain(value) for value in own.values()] for own in self._settings]),
        )

    @staticmethod
    def _device(leaves: list[Any]) -> torch.device:
        """Where the model runs: the latents are its first argument that has rows."""
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        return max(tensors, key=lambda x: x.ndim).device

    def _drop_outdated(self) -> None:
        """Drop graphs whose weights, adapters or kept outputs are others now."""
        number = self._weights.look(self.state.step)
        if number != self._number:
            self._number = number
            self.forget()
        for key, graph in list(self._graphs.items()):
            if any(version_of(x) != version for x, version in graph.kept):
                # the next forward keeps others, which a recording has to find there
                del self._graphs[key]
                self._seen.discard(key)

    # ---- what ----

    def _captured(
        self, run: Callable[[Call], Any], leaves: list[Any], spec: Any, patch: InstancePatch
    ) -> _Graph | None:
        """A recording of a forward on these arguments.

        ``None``: it has computed what later forwards are handed out, in memory that is a graph's.
        """
        device, state = self._device(leaves), self.state
        inputs = [
            torch.empty_like(x, device=device).copy_(x) if isinstance(x, torch.Tensor) else None
            for x in leaves
        ]
        arguments = [x if copy is None else copy for x, copy in zip(leaves, inputs, strict=True)]
        versions = [-1 if x is None else version_of(x) for x in inputs]
        for invariant in self._invariants:
            invariant.checks = None  # what is kept stays what it is: a graph reads it there
        before = self._outputs()
        own = state.clock
        clock = None if own is None else own.clone()
        state.clock = clock
        try:
            replay, out = self.capture(lambda: run(tree_unflatten(arguments, spec)))
        finally:
            state.clock = own
        kept = self._outputs()
        if list(map(id, kept)) != list(map(id, before)):
            for invariant in self._invariants:
                invariant.forget()
            return None
        # the forward may write into its arguments: those are given anew every time
        filled = [
            None if copy is None or version_of(copy) != version else (x, version_of(x))
            for x, copy, version in zip(leaves, inputs, versions, strict=True)
        ]
        self.patch.steps["captured"] += 1
        return _Graph(
            replay,
            out,
            inputs,
            filled,
            clock,
            state.entered,
            [(x, version_of(x)) for x in kept],
            patch,
        )

    def _outputs(self) -> list[torch.Tensor]:
        """What is handed out again in later forwards."""
        kept = chain.from_iterable(x.kept.values() for x in self._invariants)
        values = [x.value for x in kept]
        return [x for value in values for x in (value if isinstance(value, list) else [value])]

    def _replayed(self, graph: _Graph, leaves: list[Any]) -> Any:
        for index, (x, copy) in enumerate(zip(leaves, graph.inputs, strict=True)):
            if copy is None:
                continue
            before = graph.filled[index]
            version = version_of(x)
            if before is None or before[0] is not x or before[1] != version or version < 0:
                copy.copy_(x)
                graph.filled[index] = x, version
        if graph.clock is not None and self.state.clock is not None:
            graph.clock.copy_(self.state.clock)
        graph.replay()
        self.state.entered = graph.entered
        self.patch.steps["replayed"] += 1
        # the next replay writes where these are
        return tree_map_only(torch.Tensor, torch.clone, graph.out)


def _plain(value: Any) -> Any:
    """A setting of a processor, where it is plain; of anything else, which object it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return id(value)
