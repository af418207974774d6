"""Counting the kernels of a denoising step on the meta device, and the bytes they move.

Like :mod:`pag_fast.analysis.flops`, this runs nothing: full-size models without weights are traced,
and every op that would launch a kernel counts once. Views and allocations launch none; attention
counts as the one fused kernel it is on a GPU. The counts are the same integers every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import ops
from ..config import PatchConfig
from ..models.inputs import Inputs
from ..ops.backend import IMPLEMENTATIONS
from ..sharing.arguments import latents_of
from ..sharing.rows import BranchState
from .counter import run_op
from .flops import controlnet_step, patched_step, stock_step

# allocation and bookkeeping: nothing runs on a device
_FREE = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::is_pinned",
    "aten::set_",
    "aten::promote_types",
)


@dataclass(frozen=True)
class LaunchCounts:
    """Kernels of a step of guidance, its combination included, and the bytes they read and write.

    ``patched`` is a step after a call's first, on the PyTorch backend.
    """

    stock: int
    patched: int
    stock_bytes: int = 0
    patched_bytes: int = 0

    @property
    def fewer(self) -> float:
        """Part of stock's launches that are gone."""
        return 1 - self.patched / self.stock


class _FusedAttention(TorchFunctionMode):
    """Attention as one op: traced without weights, it would fall into products and a softmax."""

    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) > 2 else [kwargs[n] for n in _QKV]
        rows, heads, tokens, _ = query.shape
        # a fused kernel writes what the output projection reads: heads beside each other
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        self.counts.add("attention", (query, key, value, out))
        return out


_QKV = ("query", "key", "value")


class Launches(TorchDispatchMode):
    """Counts ops that launch a kernel, those inside the ops of pag_fast included, and their bytes.

    Attributes:
        ops: launches by name of the op.
        bytes: read and written, every operand once, an expanded one by what it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.bytes = 0

    def __enter__(self) -> Launches:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in IMPLEMENTATIONS:
            with self, _FusedAttention(self):
                return IMPLEMENTATIONS[name](*args, **kwargs)
        out = run_op(func, args, kwargs)
        if is_launch(func):
            self.add(name, (args, kwargs, out))
        return out

    def add(self, name: str, operands: Any) -> None:
        """Count one launch of ``name`` that reads or writes the tensors in ``operands``."""
        self.ops[name] += 1
        seen = {}
        for x in tree_leaves(operands):
            if isinstance(x, torch.Tensor):
                seen[id(x)] = x
        self.bytes += sum(_held(x) for x in seen.values())

    @property
    def total(self) -> int:
        return self.ops.total()


def is_launch(func: Any) -> bool:
    """Whether an ATen op runs something on a device: views and allocations do not."""
    arguments = func._schema.arguments
    view = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
    return not view and not func._schema.name.startswith(_FREE)


def _held(x: torch.Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


NewCounter = Callable[[], Launches]


@contextmanager
def counted(new: NewCounter = Launches) -> Iterator[Launches]:
    """Count what runs inside a ``with`` block, attention as one launch."""
    launches = new()
    with torch.no_grad(), launches, _FusedAttention(launches):
        yield launches


def launch_counts(
    pipeline: str, layers: Sequence[str] | None = None, *, cfg: bool = True
) -> LaunchCounts:
    """Launches and bytes of a pipeline's step for one image at its published size in fp16.

    Args:
        pipeline: class name, as in :func:`pag_fast.supported_pipelines`.
        layers: perturbed layers; omitted, those that the documentation names.

    Raises:
        ValueError: no such pipeline, or one without PAG of its own: it has no stock to compare.
    """
    from ..pipelines.registry import HOSTS
    from .published import find_card, meta_model

    card = find_card(pipeline)
    if card.pipeline in HOSTS:
        raise ValueError(
            f"{pipeline} has no PAG of its own, so that there are no launches of stock PAG to "
            "count: choose a PAG pipeline such as StableDiffusionXLPAGPipeline."
        )
    chosen = list(layers or card.documented_layers)
    model = meta_model(card, "denoiser")
    parts = [denoiser_launches(model, chosen, card.size.inputs(model), cfg=cfg)]
    if card.controlnet is not None:
        net = meta_model(card, "controlnet")
        parts.append(controlnet_launches(net, card.size.inputs(net), cfg=cfg))
    parts.append(guidance_launches(model, card.size.inputs(model), cfg=cfg))
    return LaunchCounts(
        sum(stock.total for stock, _ in parts),
        sum(patched.total for _, patched in parts),
        sum(stock.bytes for stock, _ in parts),
        sum(patched.bytes for _, patched in parts),
    )


def denoiser_launches(
    model: Any, layers: Sequence[str], inputs: Inputs, *, cfg: bool, new: NewCounter = Launches
) -> tuple[Launches, Launches]:
    """Stock's launches and ours, counted by what ``new`` makes."""
    with stock_step(model, layers, cfg=cfg) as rows, counted(new) as stock:
        model(**inputs(rows), return_dict=False)
    with patched_step(model, layers, cfg=cfg, config=PatchConfig(), eager=True) as (state, rows):
        patched = _second_forward(model, inputs(rows), state, new)
    return stock, patched


def controlnet_launches(
    model: Any, inputs: Inputs, *, cfg: bool, new: NewCounter = Launches
) -> tuple[Launches, Launches]:
    """As :func:`denoiser_launches`, for a ControlNet."""
    with counted(new) as stock:
        model(**inputs(3 if cfg else 2), return_dict=False)
    with controlnet_step(model, cfg=cfg, eager=True) as (state, rows):
        patched = _second_forward(model, inputs(rows), state, new)
    return stock, patched


def _second_forward(
    model: Any, call: dict[str, Any], state: BranchState, new: NewCounter
) -> Launches:
    """What a call's first step leaves behind, later steps do without."""
    for _ in range(2):
        state.step += 1
        with counted(new) as launches:
            model(**call, return_dict=False)
    return launches


def guidance_launches(
    model: Any, inputs: Inputs, *, cfg: bool, new: NewCounter = Launches
) -> tuple[Launches, Launches]:
    """As :func:`denoiser_launches`, for the combination of the branches' predictions."""
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    call = inputs(3 if cfg else 2)
    rows = latents_of(call)
    with counted(new) as stock:
        # the methods that it calls on the pipeline return numbers
        pipe = type("Pipeline", (), {"_get_pag_scale": lambda self, t: 3.0})()
        PAGMixin._apply_perturbed_attention_guidance(pipe, rows, cfg, 7.0, 500)
    branches = rows.chunk(3 if cfg else 2)
    uncond = branches[0] if cfg else None
    with counted(new) as patched:
        ops.combine_guidance(uncond, *branches[-2:], guidance_scale=7.0, pag_scale=3.0)
    return stock, patched
