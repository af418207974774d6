"""Where kernels run and how they are launched: block sizes by chip, dtype and head dimension.

What was measured on a chip is in ``configs/<chip>.json``, written by ``python -m benchmarks.tune``
in the project's repository. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

CONFIGS = Path(__file__).parent / "configs"
# kernels are either compiled or interpreted, from their import on
INTERPRETED = bool(triton.knobs.runtime.interpret)
_AMD = ("gfx942", "gfx1100")


@dataclass(frozen=True)
class Config:
    """Tile of queries and keys, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Measured:
    """What was fastest for a kind of attention call: "torch" or "triton", and the tile for it."""

    backend: str
    config: Config


@functools.cache
def supports(device_type: str, index: int | None) -> bool:
    """Whether the kernels run there: sm_80 and later, two AMD families; a CPU when interpreted."""
    if device_type == "cpu" or INTERPRETED:
        return device_type == "cpu" and INTERPRETED
    if device_type != "cuda" or not torch.cuda.is_available():
        return False
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index or 0).gcnArchName
        return name.split(":")[0] in _AMD
    return torch.cuda.get_device_capability(index) >= (8, 0)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are: make it theirs."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def chip_name(device_name: str) -> str:
    """The name of a device's file in ``configs``: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def call_key(
    dtype: torch.dtype, head_dim: int, tokens: int, rows: int, num_attend: int, num_context: int
) -> tuple[str, int, int, int, bool]:
    """What an attention call is tuned by.

    dtype, head dimension, tokens rounded up to a power of two, attending rows for every perturbed
    one (0 at a fork, where every row of v attends), and whether there are text tokens.
    """
    bucket = 64
    while bucket < tokens:
        bucket *= 2
    mix = 0 if rows == num_attend else num_attend // (rows - num_attend)
    return str(dtype).removeprefix("torch."), head_dim, bucket, mix, num_context > 0


def read_table(path: Path) -> dict[tuple[str, int, int, int, bool], Measured]:
    """A file of ``configs`` by :func:`call_key`; empty where there is none."""
    if not path.exists():
        return {}
    names = ("dtype", "head_dim", "tokens", "attend_per_perturbed", "joint")
    entries = json.loads(path.read_text(encoding="utf-8"))["attention"]
    return {
        tuple(entry[name] for name in names): Measured(entry["backend"], Config(*entry["config"]))
        for entry in entries
    }


@functools.cache
def measured_on(
    device_type: str, index: int | None
) -> dict[tuple[str, int, int, int, bool], Measured]:
    """The table of a device."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return {}
    return read_table(CONFIGS / f"{chip_name(torch.cuda.get_device_name(index))}.json")


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """``(a, b)`` with a + b ≥ head_dim, both powers of two (b may be 0) and at least 16.

    A dot wants powers of two. 80 as 64 + 16 computes no padding, where 128 would waste three
    eighths.
    """
    whole = 1 << max(4, (head_dim - 1).bit_length())
    if whole == head_dim or whole == 16:
        return whole, 0
    half = whole // 2
    rest = 1 << max(4, (head_dim - half - 1).bit_length())
    return (half, rest) if half + rest < whole else (whole, 0)


@functools.cache
def generation(device_type: str, index: int | None) -> str:
    """How the device multiplies matrices.

    "cpu" (interpreted), "mfma" (gfx942), "wmma" (gfx1100), "wgmma" (sm_90, sm_100) or "mma".
    """
    if device_type == "cpu":
        return "cpu"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index or 0).gcnArchName
        return "wmma" if name.startswith("gfx11") else "mfma"
    return "wgmma" if torch.cuda.get_device_capability(index)[0] in (9, 10) else "mma"


def default_config(generation: str, dtype: torch.dtype, head_dim: int, tokens: int) -> Config:
    """Block sizes that fit every chip of a generation without spilling; unmeasured.

    ``benchmarks/aot.py`` checks both for every head dimension.
    """
    dim_a, dim_b = split_head_dim(head_dim)
    wide = dim_a + dim_b
    if generation == "cpu":
        # the interpreter's time is per program, not per element
        return Config(64, 64, 4, 1) if tokens < 256 else Config(128, 256, 4, 1)
    if dtype == torch.float32:
        return Config(32, 16, 8, 1) if wide <= 64 else Config(16, 16, 8, 1)
    if generation == "wmma":
        return Config(64, 32, 4, 1) if wide <= 64 else Config(32, 32, 4, 1)
    if generation == "mfma" and wide > 64:
        # 64 KiB of LDS
        return Config(64, 32, 4, 2) if wide <= 128 else Config(32, 32, 4, 1)
    if wide > 128:
        return Config(64, 32, 4, 2)
    if generation == "mma":
        return Config(64, 64, 4, 3) if wide <= 64 else Config(64, 64, 8, 2)
    if wide <= 64:
        return Config(128, 64, 4, 3 if generation == "wgmma" else 2)
    return Config(64, 64, 4, 2) if dim_b else Config(128, 64, 8, 2)


def dot_precision(generation: str, dtype: torch.dtype) -> str:
    """``input_precision`` of a dot: fp32 in three passes of NVIDIA's tensor cores.

    AMD's and the interpreter's are exact as they are; NVIDIA's FMA code for it spills.
    """
    return "tf32x3" if dtype == torch.float32 and generation in ("mma", "wgmma") else "ieee"
