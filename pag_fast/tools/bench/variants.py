"""The ways to run one pipeline that a benchmark compares: no PAG, stock PAG, patched; compiled."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ... import PatchConfig, patch
from ...models.registry import controlnets, denoiser_name, uncompiled
from ...runtime.access.entry import Entry
from ...runtime.compiled.compilation import enough_graphs
from ..demo import perturbed_layers
from ..metrics import decibels

NO_PAG, STOCK, PATCHED = "no PAG", "stock", "patched"
COMPILED, GRAPHS = " compiled", " graphs"


class Variant:
    """One way to run a pipeline: call it as the pipeline.

    Attributes:
        pipe: a shallow copy, which shares the models; no call leaves anything on them.
        fixed: arguments of every call.
    """

    def __init__(
        self, pipe: Any, *, compiled: bool = False, backend: Any = "inductor", **fixed: Any
    ) -> None:
        self.pipe, self.fixed = pipe, fixed
        # kept, so that taking turns recompiles nothing. Not dynamic: variants differ in their
        # rows, and one function's second shape would be compiled for any number of rows
        self._compiled = [
            (module, torch.compile(module._call_impl, dynamic=False, backend=backend))
            for module in (_models(pipe) if compiled else [])
        ]

    def __call__(self, **call: Any) -> Any:
        with self._installed():
            return self.pipe(**{**call, **self.fixed})

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """The models compiled, as ``module.compile()`` does it, and then as they were."""
        with ExitStack() as stack:
            if self._compiled:
                # all graphs of all modules count for one function, ``Module._call_impl``
                stack.enter_context(enough_graphs())
            for module, compiled in self._compiled:
                stack.enter_context(_attribute(module, "_compiled_call_impl", compiled))
            yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute set on the instance for a while, where so far perhaps only its class has it."""
    own = vars(owner)
    entry = own.get(name)
    if isinstance(entry, Entry):  # of a patched pipeline: it stays in front
        displaced, entry.displaced = entry.displaced, value
        try:
            yield
        finally:
            entry.displaced = displaced
        return
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


def _models(pipe: Any) -> list[Any]:
    found = [uncompiled(getattr(pipe, denoiser_name(pipe)))]
    net = getattr(pipe, "controlnet", None)
    return found + ([] if net is None else list(controlnets(net)))


def variants(
    pipe: Any,
    config: PatchConfig | None = None,
    *,
    compiled: bool | Collection[str] = False,
    graphs: bool = False,
    backend: Any = "inductor",
) -> dict[str, Variant]:
    """No PAG, stock PAG and patched; with ``compiled``, each of them compiled too.

    Args:
        pipe: an unpatched PAG pipeline. It is left as it is.
        config: its layers are perturbed by stock as well.
        compiled: or the names of those to compile.
        graphs: patched with CUDA graphs, too.
        backend: what ``torch.compile`` takes.

    Raises:
        ValueError: a pipeline that is patched already, or that cannot be.
    """
    if hasattr(pipe, "_pag_fast"):
        raise ValueError(
            "The benchmark compares with the unpatched pipeline: call unpatch(pipe) first."
        )
    config = config or PatchConfig()
    # also refuses what is no PAG pipeline, before anything runs
    patch(copy.copy(pipe), config=config)
    layers = perturbed_layers(pipe, config)
    if compiled:
        # graphs of an earlier benchmark would count towards the recompile limit
        torch._dynamo.reset()
    found = {}
    if isinstance(compiled, bool):
        compiled = (NO_PAG, STOCK, PATCHED) if compiled else ()
    for suffix in ("", COMPILED):
        options: dict[str, Any] = {"compiled": bool(suffix), "backend": backend}
        stock = copy.copy(pipe)
        stock.pag_applied_layers = layers
        for name in (NO_PAG, STOCK, PATCHED):
            if suffix and name not in compiled:
                continue
            if name == PATCHED:
                # each patched copy keeps its own forwards, which its graphs guard on
                way = Variant(patch(copy.copy(pipe), config=config), **options)
            else:
                off: dict[str, Any] = {"pag_scale": 0.0} if name == NO_PAG else {}
                way = Variant(copy.copy(stock), **off, **options)
            found[name + suffix] = way
    if graphs:
        ours = patch(copy.copy(pipe), config=dataclasses.replace(config, graphs=True))
        found[PATCHED + GRAPHS] = Variant(ours)
    return found


def compare_outputs(outputs: dict[str, torch.Tensor], *, peak: float = 1.0) -> dict[str, float]:
    """PSNR against stock of every variant with PAG, the worst of the batch, in dB.

    Args:
        outputs: pictures or latents ``(n, ...)`` by variant.
        peak: their range.
    """
    reference = outputs[STOCK].float() / peak
    return {
        name: min(
            (decibels(a, b) for a, b in zip(output.float() / peak, reference, strict=True)),
            default=math.inf,
        )
        for name, output in outputs.items()
        if name != STOCK and not name.startswith(NO_PAG)
    }
