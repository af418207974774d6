"""What a denoising step costs at least: FLOPs, bytes and launches of every op, and rates of GPUs.

Steps are traced on the meta device, as diffusers runs them with CFG alone, with its own PAG, and
patched. Nothing is timed.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pag_fast.analysis import kernel_counts as launches
from pag_fast.analysis.flops import controlnet_cost, patched_flops
from pag_fast.analysis.lower_bound import lower_bound, trace
from pag_fast.analysis.published import ModelCard, find_card, meta_model
from pag_fast.config import PatchConfig
from pag_fast.sharing.arguments import latents_of


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products and convolutions, FLOP/s of attention, bytes/s of memory."""

    products: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Chip:
    """A GPU: what its datasheet says, and the best that was published for real kernels on it."""

    name: str
    peak: Rates
    attained: Rates


# sources: the page, below its table of rates; 0.867 is the share of the peak bandwidth
# that a copy reaches on an H100, taken for all three
CHIPS = [
    Chip(
        "A100 SXM 80 GB",
        Rates(312e12, 312e12, 2.039e12),
        Rates(271.2e12, 0.73 * 312e12, 0.867 * 2.039e12),
    ),
    Chip(
        "H100 SXM",
        Rates(989e12, 989e12, 3.35e12),
        Rates(794.5e12, 476e12, 0.867 * 3.35e12),
    ),
    Chip(
        "H200 SXM",
        Rates(989e12, 989e12, 4.8e12),
        Rates(794.5e12, 476e12, 0.867 * 4.8e12),
    ),
]
# CPU time until an op of eager mode is on its way, seconds: the range published, see the page
LAUNCH = (5e-6, 25e-6)


@dataclass(frozen=True)
class Published:
    """Seconds per step that somebody published for a model with CFG and without PAG."""

    pipeline: str
    chip: str
    setup: str
    step: float
    source: str


_XL, _SD = "StableDiffusionXLPAGPipeline", "StableDiffusionPAGPipeline"
_A100, _H100 = CHIPS[0].name, CHIPS[1].name
# links, whose addresses and conditions are on the page
_FAL, _BLOG, _FAST = "[fal.ai]", "[PyTorch blog]", "[stable-fast]"
PUBLISHED = [
    Published(_XL, _A100, "diffusers, torch 2.1, SDPA", 5.933 / 50, _FAL),
    Published(_XL, _A100, "… compiled", 5.247 / 50, _FAL),
    Published(_XL, _A100, "… compiled, channels_last", 5.132 / 50, _FAL),
    Published(_XL, _A100, "TensorRT 9.0, CUDA graphs", 4.104 / 50, _FAL),
    Published(_XL, _A100, "diffusers, bf16, SDPA", 3.31 / 30, _BLOG),
    Published(_XL, _A100, "… compiled", 2.54 / 30, _BLOG),
    Published(_XL, _H100, "diffusers, torch 2.1", 1 / 14.9, _FAST),
    Published(_XL, _H100, "… compiled, max-autotune", 1 / 18.5, _FAST),
    Published(_XL, _H100, "stable-fast", 1 / 21.6, _FAST),
    Published(_SD, _A100, "diffusers, torch 2.1, SDPA", 1.590 / 50, _FAL),
    Published(_SD, _A100, "… compiled", 1.351 / 50, _FAL),
    Published(_SD, _A100, "… compiled, channels_last", 1.065 / 50, _FAL),
    Published(_SD, _A100, "TensorRT 9.0, CUDA graphs", 0.818 / 50, _FAL),
    Published(_SD, _H100, "diffusers, torch 2.1", 1 / 54.5, _FAST),
    Published(_SD, _H100, "… compiled, max-autotune", 1 / 66.0, _FAST),
    Published(_SD, _H100, "stable-fast", 1 / 104.6, _FAST),
]

CLASSES = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "convolutions": ("aten::convolution", "aten::cudnn_convolution"),
    "attention": (
        "attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
    ),
    "norms": ("aten::native_group_norm", "aten::native_layer_norm"),
}
REST = "element-wise, copies"


def class_of(name: str) -> str:
    """The class of an op, by its name in a trace."""
    return next((key for key, names in CLASSES.items() if name in names), REST)


@dataclass(frozen=True)
class Op:
    """One launch: FLOPs, and the bytes it reads and writes."""

    name: str
    flops: int
    moved: int

    def seconds(self, rates: Rates) -> float:
        """The least time: it computes while it moves."""
        rate = rates.attention if self.name == "attention" else rates.products
        return max(self.flops / rate, self.moved / rates.memory)


class Recorded(launches.Launches):
    """Keeps every launch, where its base class keeps sums."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Op] = []

    def add(self, name: str, operands: Any) -> None:
        before = self.bytes
        super().add(name, operands)
        self.seen.append(Op(name, _flops(name, operands), self.bytes - before))


def _flops(name: str, operands: Any) -> int:
    if name == "attention":
        return sdpa_flop_count(*(x.shape for x in operands[:3]))
    namespace, _, op = name.partition("::")
    formula = flop_registry.get(getattr(getattr(torch.ops, namespace), op))
    if formula is None:
        return 0
    args, kwargs, out = operands
    return formula(*args, **kwargs, out_val=out)


@dataclass
class Step:
    """The launches of one denoising step of one image."""

    ops: list[Op] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def moved(self) -> int:
        return sum(op.moved for op in self.ops)

    def at_once(self, rates: Rates) -> float:
        """Seconds if all ops overlapped perfectly: whichever of FLOPs and bytes takes longer."""
        return max(self.flops / rates.products, self.moved / rates.memory)

    def op_by_op(self, rates: Rates) -> float:
        """Seconds if every op ran alone at the given rates, as in eager mode."""
        return sum(op.seconds(rates) for op in self.ops)

    def shares(self, rates: Rates) -> dict[str, float]:
        """Part of :meth:`op_by_op` by class of ops."""
        seconds: Counter[str] = Counter()
        for op in self.ops:
            seconds[class_of(op.name)] += op.seconds(rates)
        return {key: seconds[key] / seconds.total() for key in (*CLASSES, REST)}

    def __add__(self, other: Step) -> Step:
        return Step(self.ops + other.ops)


@dataclass
class Steps:
    """What one pipeline runs per step with CFG alone, with stock PAG, and patched.

    ``patched`` is a step after a call's first. ``first`` are the FLOPs of that one, and ``least``
    the lower bound for it, both as the ledger counts them.
    """

    cfg: Step
    stock: Step
    patched: Step
    first: int = 0
    least: int = 0

    def __add__(self, other: Steps) -> Steps:
        return Steps(
            self.cfg + other.cfg,
            self.stock + other.stock,
            self.patched + other.patched,
            self.first + other.first,
            self.least + other.least,
        )


def _step(counts: Recorded) -> Step:
    return Step(counts.seen)


@functools.cache
def _denoiser(pipeline: str) -> Steps:
    card = find_card(pipeline)
    layers = list(card.documented_layers)
    model = meta_model(card, "denoiser")
    inputs = card.size.inputs(model)
    with launches.counted(Recorded) as cfg:
        model(**inputs(2), return_dict=False)
        uncond, cond = latents_of(inputs(2)).chunk(2)
        uncond + 7.0 * (cond - uncond)
    stock, patched = launches.denoiser_launches(model, layers, inputs, cfg=True, new=Recorded)
    guided = launches.guidance_launches(model, inputs, cfg=True, new=Recorded)
    return Steps(
        _step(cfg),
        _step(stock) + _step(guided[0]),
        _step(patched) + _step(guided[1]),
        patched_flops(model, layers, inputs, cfg=True, config=PatchConfig()),
        lower_bound(model, trace(model, inputs), layers, inputs, cfg=True),
    )


def _controlnet(card: ModelCard) -> Steps:
    net = meta_model(card, "controlnet")
    inputs = card.size.inputs(net)
    with launches.counted(Recorded) as cfg:
        net(**inputs(2), return_dict=False)
    stock, patched = launches.controlnet_launches(net, inputs, cfg=True, new=Recorded)
    cost = controlnet_cost(net, inputs, cfg=True)
    return Steps(_step(cfg), _step(stock), _step(patched), cost.patched, cost.bound)


def steps(pipeline: str) -> Steps:
    """A pipeline's step for one image at its published size in fp16, on the PyTorch backend.

    Raises:
        ValueError: no such pipeline.
    """
    card = find_card(pipeline)
    if card.controlnet is None:
        return _denoiser(pipeline)
    plain = pipeline.replace("ControlNet", "")
    # the denoiser of a ControlNet pipeline is that of the pipeline without: traced once for both
    same = find_card(plain).config == card.config
    return _denoiser(plain if same else pipeline) + _controlnet(card)
