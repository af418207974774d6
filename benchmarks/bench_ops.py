"""Each op, and each layer around it, against stock's processor and what PyTorch has.

On a GPU the layers are those of published models in fp16, and every backend runs; on a CPU they
are a quarter as long in fp32, and PyTorch is the only backend: Triton's interpreter is not worth
timing. Every row has its floor, what the op must move and compute at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from benchmarks.cases import LATENTS, LAYERS, Layer, for_device
from benchmarks.queued import QueuedClock
from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.ops.perturbed_attention import attention_flops
from pag_fast.processors import (
    PerturbedJointAttention,
    PerturbedLinearAttention,
    PerturbedRotaryAttention,
    PerturbedSelfAttention,
)
from pag_fast.sharing.rows import BranchState
from pag_fast.tools.bench.record import Row

Calls = dict[str, Callable[[], Any]]
ROWS, ATTEND = 3, 2  # uncond, cond and perturbed


STOCK = {
    "self": ("PAGCFGIdentitySelfAttnProcessor2_0", PerturbedSelfAttention),
    "joint": ("PAGCFGJointAttnProcessor2_0", PerturbedJointAttention),
    "rotary": ("PAGCFGHunyuanAttnProcessor2_0", PerturbedRotaryAttention),
    "linear": ("PAGCFGSanaLinearAttnProcessor2_0", PerturbedLinearAttention),
}
# by name of the variant; "auto" is what a pipeline runs
BACKENDS = {"patched": "auto", "patched torch": "torch", "patched triton": "triton"}
BASELINES = ("SDPA", "stock", "stock compiled")


def floor(layer: Layer, bytes_each: int = 2) -> tuple[int, int]:
    """Bytes and FLOPs that the op on this layer needs at least."""
    tokens = layer.tokens + layer.context
    row = bytes_each * tokens * layer.width
    query_rows = ROWS if layer.context else ATTEND
    moved = row * (2 * query_rows + ROWS + ROWS)
    if layer.family == "linear":
        return moved, 4 * ATTEND * tokens * layer.width * (layer.head_dim + 1)
    shape = (ROWS, tokens, layer.heads, layer.head_dim)
    return moved, attention_flops(shape, ATTEND, layer.context, 0)


def combine_floor(elements: int, rescale: bool, bytes_each: int = 2) -> tuple[int, int]:
    """As :func:`floor`, for the combination of three predictions of ``elements`` numbers."""
    return bytes_each * elements * ((6 if rescale else 3) + 1), 5 * elements


def op_calls(
    layer: Layer, device: str, dtype: torch.dtype, names: Sequence[str]
) -> tuple[Calls, torch.Tensor]:
    """The op by variant, beside plain attention of the rows that attend; and what it must return.

    Each call has a ``v`` of its own, where the op may write: only its first result is the expected.
    """
    shape = (ROWS, layer.tokens + layer.context, layer.heads, layer.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    if not layer.context:
        q, k = q[:ATTEND], k[:ATTEND]
    calls: Calls = {}
    mix: dict[str, Any] = {"num_attend": ATTEND}
    if layer.family == "linear":
        truth, op = reference.linear_attention, ops.linear_attention
    else:
        truth, op = reference.perturbed_attention, ops.perturbed_attention_
        mix["num_context"] = layer.context
        heads_first = [x[:ATTEND].transpose(1, 2) for x in (q, k, v)]
        calls["SDPA"] = lambda: F.scaled_dot_product_attention(*heads_first)
    for name in names:
        own, backend = v.clone(), BACKENDS[name]
        calls[name] = lambda own=own, b=backend: op(q, k, own, **mix, backend=b)
    return calls, truth(q.float(), k.float(), v.float(), **mix)


@torch.no_grad()
def layer_calls(layer: Layer, device: str, dtype: torch.dtype, names: Sequence[str]) -> Calls:
    """The whole layer: stock's processor, eager and compiled, and ours by variant."""
    options: dict[str, Any] = {"bias": layer.family != "linear"}
    arguments: dict[str, Any] = {}
    if layer.family == "rotary":
        options |= {"qk_norm": "layer_norm", "eps": 1e-6}
        table = torch.randn(layer.tokens, layer.head_dim, device=device)
        arguments["image_rotary_emb"] = (table, table)
    if layer.context:
        options |= {"added_kv_proj_dim": layer.width, "context_pre_only": False}
        arguments["encoder_hidden_states"] = torch.randn(
            ROWS, layer.context, layer.width, dtype=dtype, device=device
        )
    attn = Attention(layer.width, heads=layer.heads, dim_head=layer.head_dim, **options)
    attn = attn.to(device, dtype).eval()
    x = torch.randn(ROWS, layer.tokens, layer.width, dtype=dtype, device=device)
    name, ours = STOCK[layer.family]
    theirs = getattr(stock, name)()
    state = BranchState()
    state.slabs = (ROWS, ROWS, ROWS)
    compiled = torch.compile(lambda x: theirs(attn, x, **arguments), dynamic=False)
    calls: Calls = {
        "stock": lambda: theirs(attn, x, **arguments),
        "stock compiled": lambda: compiled(x),
    }
    for variant in names:
        processor = ours(state, backend=BACKENDS[variant])
        calls[variant] = lambda processor=processor: processor(attn, x, **arguments)
    return {name: _without_gradients(call) for name, call in calls.items()}


def combine_calls(
    rescale: float, device: str, dtype: torch.dtype, names: Sequence[str]
) -> tuple[Calls, torch.Tensor]:
    """Guidance on SDXL's latents, batch 4, by variant, and what it must return."""
    u, c, p = torch.randn(3, *LATENTS, dtype=dtype, device=device)
    scales = {"guidance_scale": 7.0, "pag_scale": 3.0, "rescale": rescale}

    def theirs() -> torch.Tensor:
        out = u + 7.0 * (c - u) + 3.0 * (c - p)
        return rescale_noise_cfg(out, c, guidance_rescale=rescale) if rescale else out

    compiled = torch.compile(theirs, dynamic=False)
    calls: Calls = {"stock": theirs, "stock compiled": lambda: compiled()}
    for name in names:
        calls[name] = lambda b=BACKENDS[name]: ops.combine_guidance(u, c, p, **scales, backend=b)
    return calls, reference.combine_guidance(u.float(), c.float(), p.float(), **scales)


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def check(calls: Calls, expected: torch.Tensor, *, skip: Sequence[str] = ()) -> None:
    """Every call returns ``expected``, as far as its dtype can tell."""
    for name, call in calls.items():
        if name in skip:
            continue
        out = call()
        out = torch.cat(out, dim=1) if isinstance(out, tuple) else out
        close = 2e-2 if out.dtype != torch.float32 else 1e-4
        difference = (out.float() - expected.float()).abs().max().item()
        assert torch.allclose(out.float(), expected.float(), atol=close, rtol=close), (
            f"{name} is {difference:.2g} from what it must return"
        )


@pytest.fixture
def measure(compare, compiled, device):
    """A function that times the calls of one case on this machine."""

    def run(calls: Calls, floors: tuple[int, int], dtype: torch.dtype, **rest: Any) -> None:
        if not compiled:
            calls.pop("stock compiled", None)
        rest["settings"] |= dict(zip(("floor_bytes", "floor_flops"), floors, strict=True))
        extra = {} if device == "cpu" else {"clock": QueuedClock()}
        name = str(dtype).removeprefix("torch.")
        compare(
            calls, suite="op", dtype=name, rounds=20 if device == "cpu" else 100, **rest, **extra
        )

    return run


def _plan(device: str) -> tuple[torch.dtype, list[str]]:
    if device == "cpu":
        return torch.float32, ["patched"]
    return torch.float16, list(BACKENDS)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.model)
def test_op(layer, measure, device):
    (dtype, names), layer = _plan(device), for_device(layer, device)
    calls, expected = op_calls(layer, device, dtype, names)
    check(calls, expected, skip=["SDPA"])
    measure(
        calls,
        floor(layer, dtype.itemsize),
        dtype,
        case=f"{layer.model}: op",
        settings=asdict(layer),
    )


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.model)
def test_layer(layer, measure, device):
    (dtype, names), layer = _plan(device), for_device(layer, device)
    calls = layer_calls(layer, device, dtype, names)
    out = calls["stock"]()
    check(
        calls,
        torch.cat(out, dim=1) if isinstance(out, tuple) else out,
        skip=["stock compiled"],
    )
    measure(
        calls,
        floor(layer, dtype.itemsize),
        dtype,
        case=f"{layer.model}: layer",
        settings=asdict(layer),
    )


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_combine(rescale, measure, device):
    dtype, names = _plan(device)
    calls, expected = combine_calls(rescale, device, dtype, names)
    check(calls, expected, skip=["stock compiled"])
    measure(
        calls,
        combine_floor(math.prod(LATENTS), rescale > 0, dtype.itemsize),
        dtype,
        case="SDXL 1024, batch 4: combine" + " rescale" * (rescale > 0),
        settings={"latents": LATENTS, "rescale": rescale},
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line per case: floors, times in µs, rates, and how often as fast as stock.

    Rates are those of the patched variant in TFLOP/s and GB/s, by the floors; the speed-up is
    against the fastest baseline.
    """
    names = [*BASELINES, *BACKENDS]
    lines = ["| case | MB | GFLOP | " + " | ".join(f"{n}, µs" for n in names)]
    lines[0] += " | rates | speed-up |"
    lines.append("|---" + "|--:" * (len(names) + 2) + "|---|--:|")
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.variant] = row
    for case, by_name in cases.items():
        times = {name: row.seconds.median for name, row in by_name.items()}
        settings = next(iter(by_name.values())).settings
        moved, flops = settings["floor_bytes"], settings["floor_flops"]
        cells = [case, f"{moved / 1e6:.1f}", f"{flops / 1e9:.2f}"]
        cells += [f"{1e6 * times[name]:.0f}" if name in times else "" for name in names]
        ours = times["patched"]
        cells.append(f"{flops / ours / 1e12:.2f} TFLOP/s, {moved / ours / 1e9:.1f} GB/s")
        fastest = min((times[name] for name in BASELINES if name in times), default=None)
        cells.append("" if fastest is None else f"{fastest / ours:.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
