"""Where kernels run and how they are launched: block sizes by chip, dtype and head dimension.

What was measured on a chip is in ``configs/<chip>.json``, written by ``python -m benchmarks.tune``
in the project's repository. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

CONFIGS = Path(__file__).parent / "configs"
# kernels are either compiled or interpreted, from their import on
INTERPRETED = bool(triton.knobs.runtime.interpret)
_AMD = ("gfx942", "gfx1100")
_NVIDIA = ("mma", "wgmma", "mma120")


@dataclass(frozen=True)
class Config:
    """Tile of queries and keys, warps, and stages of the software pipeline.

    ``specialised``: attending rows run in ``specialised_attention``, where it takes them.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    specialised: bool = False


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
    """The table of a device, or of the nearest chip that runs the same binaries."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return {}
    own = read_table(CONFIGS / f"{chip_name(torch.cuda.get_device_name(index))}.json")
    if own:
        return own
    nearest = nearest_table(CONFIGS, *architecture(index))
    return read_table(nearest) if nearest else {}


def measured_tile(v: torch.Tensor, num_attend: int, num_context: int) -> Config | None:
    """The tile that was measured for such a call on this chip, if one was."""
    table = measured_on(v.device.type, v.device.index)
    if not table:
        return None
    rows, tokens, _, head_dim = v.shape
    found = table.get(call_key(v.dtype, head_dim, tokens, rows, num_attend, num_context))
    return found.config if found else None


def architecture(index: int | None) -> tuple[str, int]:
    """What a device's binaries are compiled for ("sm_90", "gfx942"), and its multiprocessors."""
    properties = torch.cuda.get_device_properties(index or 0)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def nearest_table(folder: Path, architecture: str, processors: int) -> Path | None:
    """The table of that architecture whose chip is most alike in size, or ``None``.

    Chips of one architecture run the same binaries. What is fastest among these may differ, but
    less than it does from a choice that nobody has measured.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        head = json.loads(path.read_text(encoding="utf-8"))
        if head.get("architecture") == architecture:
            found.append((abs(math.log(head["processors"] / processors)), path))
    return min(found)[1] if found else None


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


_target = "mma"


@contextlib.contextmanager
def target(generation: str) -> Iterator[None]:
    """Launches of meta tensors are prepared as for such a chip: to compile for it without one."""
    global _target
    before, _target = _target, generation
    try:
        yield
    finally:
        _target = before


def generation(device_type: str, index: int | None) -> str:
    """How the device multiplies matrices.

    "cpu" (interpreted), "mfma" (gfx942), "wmma" (gfx1100), "mma" (sm_80 to sm_89), "wgmma" (sm_90,
    sm_100) or "mma120" (sm_120: the instructions of "mma", by another register allocation).
    """
    if device_type in ("cpu", "meta"):
        return "cpu" if device_type == "cpu" else _target
    return _generation_of_gpu(index)


@functools.cache
def _generation_of_gpu(index: int | None) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index or 0).gcnArchName
        return "wmma" if name.startswith("gfx11") else "mfma"
    return nvidia_generation(torch.cuda.get_device_capability(index)[0])


def nvidia_generation(major: int) -> str:
    """:func:`generation` of an NVIDIA chip by the first number of its compute capability."""
    if major in (9, 10):
        return "wgmma"
    return "mma" if major < 9 else "mma120"


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
    if generation in ("mma", "mma120"):
        if wide <= 64:
            return Config(64, 64, 4, 3)
        if generation == "mma120":
            sm_120 = {80: Config(128, 32, 8, 2), 96: Config(64, 64, 8, 2)}
            return sm_120.get(wide, Config(128, 32, 8, 3))
        return Config(64, 64, 4, 2) if wide == 96 else Config(128, 64, 8, 2)
    if wide <= 64:
        return Config(128, 64, 4, 3 if generation == "wgmma" else 2)
    return Config(64, 64, 4, 2) if dim_b else Config(128, 64, 8, 2)


def dot_precision(generation: str, dtype: torch.dtype) -> str:
    """``input_precision`` of a dot: fp32 in three passes of NVIDIA's tensor cores.

    AMD's and the interpreter's are exact as they are; NVIDIA's FMA code for it spills.
    """
    return "tf32x3" if dtype == torch.float32 and generation in _NVIDIA else "ieee"
