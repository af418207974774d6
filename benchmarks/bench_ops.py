"""Each kernel against stock's processor and its own floor: ``python -m benchmarks.bench_ops``.

Prints what a call must move and compute at least (the floors in the kernels' docstrings), the
median times of both backends and of stock's attention processor on the same layer, and the rates
reached. Without a GPU only the floors are printed: Triton's interpreter is not worth timing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from tqdm.auto import tqdm

from benchmarks.tune import on_gpu
from pag_fast import ops
from pag_fast.branches.rows import BranchState
from pag_fast.ops.perturbed_attention import attention_flops
from pag_fast.processors import (
    PerturbedJointAttention,
    PerturbedLinearAttention,
    PerturbedRotaryAttention,
    PerturbedSelfAttention,
)

BYTES = 2  # an element of fp16


@dataclass(frozen=True)
class Layer:
    """A perturbed layer of a published model: image tokens, heads, head dimension, text tokens."""

    model: str
    family: str
    tokens: int
    heads: int
    head_dim: int
    context: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


LAYERS = [
    Layer("SDXL 1024 mid", "self", 1024, 20, 64),
    Layer("SDXL 1024 up", "self", 4096, 10, 64),
    Layer("SD 1.5 512 up.2", "self", 1024, 8, 80),
    Layer("SD 1.5 512 up.3", "self", 4096, 8, 40),
    Layer("PixArt 1024", "self", 4096, 16, 72),
    Layer("SD3 1024", "joint", 4096, 24, 64, 333),
    Layer("HunyuanDiT 1024", "rotary", 4096, 16, 88),
    Layer("Sana 1024", "linear", 1024, 70, 32),
]
STOCK = {
    "self": ("PAGCFGIdentitySelfAttnProcessor2_0", PerturbedSelfAttention),
    "joint": ("PAGCFGJointAttnProcessor2_0", PerturbedJointAttention),
    "rotary": ("PAGCFGHunyuanAttnProcessor2_0", PerturbedRotaryAttention),
    "linear": ("PAGCFGSanaLinearAttnProcessor2_0", PerturbedLinearAttention),
}


@dataclass
class Row:
    """One line of the table; times in seconds, ``None`` where nothing was measured."""

    model: str
    what: str
    floor_bytes: int
    floor_flops: int
    seconds: dict[str, float] = field(default_factory=dict)

    def rates(self) -> str:
        """Of the Triton backend: TFLOP/s and GB/s counted by the floor."""
        if "triton" not in self.seconds:
            return ""
        flops, moved = (x / self.seconds["triton"] for x in (self.floor_flops, self.floor_bytes))
        return f"{flops / 1e12:.0f} TFLOP/s, {moved / 1e9:.0f} GB/s"


def floor(layer: Layer, rows: int = 3, attend: int = 2) -> tuple[int, int]:
    """Bytes and FLOPs that the op on this layer needs at least."""
    tokens = layer.tokens + layer.context
    row = BYTES * tokens * layer.width
    query_rows = rows if layer.context else attend
    moved = row * (2 * query_rows + rows + rows)
    if layer.family == "linear":
        return moved, 4 * attend * tokens * layer.width * (layer.head_dim + 1)
    shape = (rows, tokens, layer.heads, layer.head_dim)
    return moved, attention_flops(shape, attend, layer.context, 0)


def combine_floor(elements: int, rescale: bool) -> tuple[int, int]:
    """As :func:`floor`, for the combination of three predictions of ``elements`` numbers."""
    return BYTES * elements * ((6 if rescale else 3) + 1), 5 * elements


def op_calls(layer: Layer, device: str) -> dict[str, Callable[[], object]]:
    """The op by backend."""
    shape = (3, layer.tokens + layer.context, layer.heads, layer.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(3))
    if not layer.context:
        q, k = q[:2], k[:2]
    if layer.family == "linear":
        return {
            name: lambda name=name: ops.linear_attention(q, k, v, num_attend=2, backend=name)
            for name in ("torch", "triton")
        }
    mix = {"num_attend": 2, "num_context": layer.context}
    return {
        name: lambda name=name: ops.perturbed_attention_(q, k, v, **mix, backend=name)
        for name in ("torch", "triton")
    }


@torch.no_grad()
def processor_calls(layer: Layer, device: str) -> dict[str, Callable[[], object]]:
    """The whole layer: stock's processor, eager and compiled, and ours by backend."""
    options: dict[str, Any] = {"bias": layer.family != "linear"}
    arguments: dict[str, Any] = {}
    if layer.family == "rotary":
        options |= {"qk_norm": "layer_norm", "eps": 1e-6}
        table = torch.randn(layer.tokens, layer.head_dim, device=device)
        arguments["image_rotary_emb"] = (table, table)
    if layer.context:
        options |= {"added_kv_proj_dim": layer.width, "context_pre_only": False}
        arguments["encoder_hidden_states"] = torch.randn(
            3, layer.context, layer.width, dtype=torch.float16, device=device
        )
    attn = Attention(layer.width, heads=layer.heads, dim_head=layer.head_dim, **options)
    attn = attn.to(device, torch.float16).eval()
    x = torch.randn(3, layer.tokens, layer.width, dtype=torch.float16, device=device)
    name, ours = STOCK[layer.family]
    theirs = getattr(stock, name)()
    state = BranchState()
    state.slabs = (3, 3, 3)
    compiled = torch.compile(lambda x: theirs(attn, x, **arguments), dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "stock": lambda: theirs(attn, x, **arguments),
        "stock compiled": lambda: compiled(x),
    }
    for backend in ("torch", "triton", "auto"):
        processor = ours(state, backend=backend)
        calls[backend] = lambda processor=processor: processor(attn, x, **arguments)
    return calls


def combine_calls(rescale: float, device: str) -> dict[str, Callable[[], object]]:
    """Guidance on SDXL's latents, batch 4, by backend."""
    u, c, p = torch.randn(12, 4, 128, 128, dtype=torch.float16, device=device).chunk(3)
    scales = {"guidance_scale": 7.0, "pag_scale": 3.0, "rescale": rescale}
    return {
        name: lambda name=name: ops.combine_guidance(u, c, p, **scales, backend=name)
        for name in ("torch", "triton")
    }


@torch.no_grad()
def bench(device: str, only: str = "", progress: bool = True) -> list[Row]:
    """All rows; timed where ``device`` is a GPU."""
    plan: list[tuple[Row, Callable[[], dict[str, Callable[[], object]]]]] = []
    for layer in (layer for layer in LAYERS if only in layer.model):
        size = floor(layer)
        plan.append((Row(layer.model, "op", *size), lambda la=layer: op_calls(la, device)))
        plan.append(
            (Row(layer.model, "layer", *size), lambda la=layer: processor_calls(la, device))
        )
    for rescale in (0.0, 0.7):
        size = combine_floor(4 * 4 * 128 * 128, rescale > 0)
        row = Row("SDXL 1024, batch 4", "combine" + " rescale" * (rescale > 0), *size)
        plan.append((row, lambda value=rescale: combine_calls(value, device)))
    for row, calls in tqdm(plan, disable=not progress or device == "cpu"):
        if device != "cpu":
            row.seconds = {name: on_gpu(call) for name, call in calls().items()}
    return [row for row, _ in plan]


def table(rows: list[Row]) -> str:
    """Markdown: floors, times in µs, and how many times as fast as stock ``auto`` is."""
    names = ["stock", "stock compiled", "torch", "triton", "auto"]
    lines = ["| model | what | MB | GFLOP | " + " | ".join(f"{n}, µs" for n in names)]
    lines[0] += " | rates | speed-up |"
    lines.append("|---|---" + "|--:" * (len(names) + 2) + "|---|--:|")
    for row in rows:
        times = [f"{1e6 * row.seconds[n]:.0f}" if n in row.seconds else "" for n in names]
        ratio = ""
        if "stock" in row.seconds:
            fastest = min(row.seconds["stock"], row.seconds["stock compiled"])
            ratio = f"{fastest / row.seconds['auto']:.2f} ×"
        cells = [
            row.model,
            row.what,
            f"{row.floor_bytes / 1e6:.1f}",
            f"{row.floor_flops / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join([*cells, *times, row.rates(), ratio]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = bench(device, arguments.only)
    print(table(rows))
    if arguments.out:
        chip = torch.cuda.get_device_name() if device == "cuda" else None
        report = {
            "chip": chip,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "rows": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
