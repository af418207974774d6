"""Compile every kernel for every chip, without one: ``python -m benchmarks.aot [--update]``.

Reads registers, stack, local and shared memory of each binary and counts the tensor-core
instructions in its assembly. Fails if shared memory is over the chip's limit, if a kernel of a head
dimension of at most 128 spills, if Hopper or Blackwell code does not use their tensor cores, or if
anything differs from the committed table ``benchmarks/aot.json``, which ``--update`` writes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from pag_fast_kernels import launch
from pag_fast_kernels.linear_attention import tile as linear_tile
from pag_fast_kernels.noisy_attention import tile as noisy_tile
from pag_fast_kernels.received_attention import tile as received_tile
from tqdm.auto import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).parent / "aot.json"
# shared memory of a block, bytes (CUDA programming guide, compute capabilities; AMD's ISA guides)
SHARED: dict[int | str, int] = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx942": 65536,
    "gfx1100": 65536,
}
HEAD_DIMS = (32, 40, 64, 72, 80, 88, 96, 128, 160, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Build:
    """What to compile: a kernel by module and name, its constants, and how it is launched.

    ``pointers`` is the element type of every pointer but those named in ``fp32``.
    """

    name: str
    module: str
    kernel: str
    pointers: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    head_dim: int = 0
    fp32: tuple[str, ...] = field(default=())


def generation_of(chip: int | str) -> str:
    """As :func:`pag_fast_kernels.launch.generation`, without the chip."""
    if isinstance(chip, str):
        return "mfma" if chip == "gfx942" else "wmma"
    return "wgmma" if chip in (90, 100) else "mma"


def attention_builds(dtype: str, generation: str) -> Iterator[Build]:
    """Every head dimension, with and without text; the variants at D = 64."""
    for head_dim in HEAD_DIMS:
        plain = [(joint, "identity", False) for joint in (False, True)]
        variants = [
            (False, "soft", False),
            (True, "soft", False),
            (False, "blur", False),
            (True, "blur", False),
            (False, "identity", True),
        ]
        for joint, perturbation, bias in plain + (variants if head_dim == 64 else []):
            yield attention_build(dtype, generation, head_dim, joint, perturbation, bias)


def attention_build(
    dtype: str,
    generation: str,
    head_dim: int,
    joint: bool = False,
    perturbation: str = "identity",
    bias: bool = False,
    config: launch.Config | None = None,
) -> Build:
    """One attention kernel, with the default block sizes unless given others."""
    dim_a, dim_b = launch.split_head_dim(head_dim)
    config = config or launch.default_config(generation, DTYPES[dtype], head_dim, 4096)
    words = [f"D={head_dim}", "joint" * joint, perturbation.replace("identity", ""), "bias" * bias]
    return Build(
        " ".join(["perturbed_attention", dtype, *filter(None, words)]),
        "perturbed_attention",
        "_perturbed_attention_fwd_kernel",
        dtype,
        {
            "HEAD_DIM": head_dim,
            "DIM_A": dim_a,
            "DIM_B": dim_b,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "JOINT": joint,
            "PERTURBATION": {"identity": 0, "soft": 1, "blur": 2}[perturbation],
            "KEY_BIAS": bias,
            "PRECISION": launch.dot_precision(generation, DTYPES[dtype]),
            "RELOAD_Q": dtype == "fp32",
            "STAGES": config.stages,
        },
        config.warps,
        config.stages,
        head_dim,
        ("strength_ptr",),
    )


def noisy_builds(dtype: str, generation: str) -> Iterator[Build]:
    """Attention with noise on its scores: a head dimension that is a power of two, and one not."""
    for head_dim in (64, 80) if dtype != "fp32" else (64,):
        dim_a, dim_b = launch.split_head_dim(head_dim)
        config = noisy_tile(generation, DTYPES[dtype], head_dim, 4096)
        yield Build(
            f"noisy_attention {dtype} D={head_dim}",
            "noisy_attention",
            "_noisy_attention_fwd_kernel",
            dtype,
            {
                "HEAD_DIM": head_dim,
                "DIM_A": dim_a,
                "DIM_B": dim_b,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "PRECISION": launch.dot_precision(generation, DTYPES[dtype]),
            },
            config.warps,
            config.stages,
            head_dim,
        )


def received_builds(dtype: str, generation: str) -> Iterator[Build]:
    """Self-Attention Guidance's column sums: both launches, and the one of a small map."""
    for head_dim in HEAD_DIMS:
        if dtype == "fp32" and generation == "wmma" and head_dim > 96:
            continue  # the op does not ask for it
        dim_a, dim_b = launch.split_head_dim(head_dim)
        config = received_tile(generation, DTYPES[dtype], head_dim)
        tiles = {
            "HEAD_DIM": head_dim,
            "DIM_A": dim_a,
            "DIM_B": dim_b,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PRECISION": launch.dot_precision(generation, DTYPES[dtype]),
        }
        columns = "_received_attention_kernel"
        kernels: list[tuple[str, str, dict[str, Any]]] = [
            ("lse", "_attention_lse_kernel", {}),
            ("columns", columns, {"IS_WHOLE": False}),
            ("whole", columns, {"IS_WHOLE": True}),
        ]
        for part, kernel, flags in kernels:
            yield Build(
                f"received_attention {dtype} {part} D={head_dim}",
                "received_attention",
                kernel,
                dtype,
                {**tiles, **flags},
                config.warps,
                config.stages,
                head_dim,
                fp32=("lse_ptr", "out_ptr"),
            )


def other_builds(dtype: str, generation: str) -> Iterator[Build]:
    """Sana's, HunyuanDiT's and the guidances' kernels, as the pipelines launch them."""
    precision = launch.dot_precision(generation, torch.float32)
    block, warps = linear_tile(generation, DTYPES[dtype])
    tiles = {"HEAD_DIM": 32, "BLOCK_D": 32, "BLOCK_N": block, "PRECISION": precision}
    for part in ("state", "apply"):
        yield Build(
            f"linear_attention {dtype} {part} D=32",
            "linear_attention",
            f"_linear_attention_{part}_kernel",
            dtype,
            tiles,
            warps,
            fp32=("state_ptr",),
        )
    yield Build(
        f"qk_norm_rope {dtype} D=88",
        "qk_norm_rope",
        "_qk_norm_rope_kernel",
        dtype,
        {
            "HEAD_DIM": 88,
            "BLOCK_PAIRS": 64,
            "BLOCK_N": 32,
            "NORM": True,
            "AFFINE": True,
            "ROPE": True,
        },
        fp32=("cos_ptr", "sin_ptr"),
    )
    yield Build(
        f"degrade_latents {dtype}",
        "degrade_latents",
        "_degrade_latents_kernel",
        dtype,
        {"KERNEL": 9, "BLOCK": 256},
        fp32=("received_ptr", "blur_ptr"),
    )
    for size, chunk, warps in (("", 1024, 4), (" large", 4096, 16)):
        flags = {"HAS_U": True, "HAS_P": True, "BLOCK": chunk}
        yield Build(
            f"combine_guidance {dtype} moments{size}",
            "combine_guidance",
            "_guidance_moments_kernel",
            dtype,
            flags,
            warps,
            fp32=("moments_ptr",),
        )
        for rescale, term_only in ((False, False), (True, False), (True, True)):
            yield Build(
                f"combine_guidance {dtype}{' rescale' * rescale}{' term' * term_only}{size}",
                "combine_guidance",
                "_combine_guidance_kernel",
                dtype,
                {**flags, "RESCALE": rescale, "TERM_ONLY": term_only, "BLOCK_CHUNKS": 1024},
                warps,
                fp32=("moments_ptr",),
            )


FLOATS = (
    "qk_scale",
    "noise_scale",
    "g",
    "s",
    "rescale",
    "eps",
    "scale_y",
    "scale_x",
    "clean_x",
    "clean_output",
    "noise_x",
    "noise_output",
)


def compile_for(build: Build, chip: int | str) -> dict[str, int]:
    """Registers, stack, local and shared memory (bytes), and tensor-core instructions."""
    kernel = getattr(sys.modules[f"pag_fast_kernels.{build.module}"], build.kernel)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in build.fp32 else f"*{build.pointers}"
            if name == "clock_ptr":
                signature[name] = "*i64"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    wave = 64 if chip == "gfx942" else 32
    target = GPUTarget("cuda" if isinstance(chip, int) else "hip", chip, wave)
    compiled = triton.compile(
        ASTSource(kernel, signature, build.constants, attributes),
        target=target,
        options={"num_warps": build.warps, "num_stages": build.stages},
    )
    found = {"shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        found |= _resources(compiled.asm["cubin"])
        for instruction in ("wgmma.mma_async", "tcgen05.mma", "mma.sync"):
            found[instruction] = compiled.asm["ptx"].count(instruction)
    else:
        text = compiled.asm["amdgcn"]
        found["reg"] = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        found["stack"] = max(map(int, re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)))
        found["mfma"] = text.count("v_mfma") + text.count("v_wmma")
    return found


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def faults(build: Build, chip: int | str, found: dict[str, int]) -> Iterator[str]:
    """Sentences on what a binary must not be."""
    where = f"{build.name} on {chip}"
    if found["shared"] > SHARED[chip]:
        yield f"{where}: {found['shared']} bytes of shared memory, the chip has {SHARED[chip]}"
    spilled = found.get("stack", 0) + found.get("local", 0)
    if build.head_dim <= 128 and spilled:
        yield f"{where}: spills {spilled} bytes"
    scores = build.module in ("perturbed_attention", "received_attention")
    if scores and build.pointers != "fp32":
        if chip == 90 and not found["wgmma.mma_async"]:
            yield f"{where}: no wgmma"
        if chip == 100 and not found["tcgen05.mma"]:
            yield f"{where}: no tcgen05"
        if isinstance(chip, str) and not found["mfma"]:
            yield f"{where}: no mfma or wmma"


def _compile(job: tuple[Build, int | str]) -> dict[str, int]:
    return compile_for(*job)


def all_builds() -> list[tuple[Build, int | str]]:
    """Everything that the package launches, for every chip."""
    return [
        (build, chip)
        for dtype in DTYPES
        for builds in (attention_builds, noisy_builds, received_builds, other_builds)
        for chip in SHARED
        for build in builds(dtype, generation_of(chip))
    ]


def read_table() -> tuple[str, dict[str, dict[str, int]]]:
    """The version of Triton that made the table, and its rows by build and chip."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table["triton"], table["binaries"]


def write_table(rows: dict[str, dict[str, int]]) -> None:
    """One line a binary, so that a change shows what it changed."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{\n "triton": "{triton.__version__}",\n "binaries": {{\n{lines}\n }}\n}}\n'
    TABLE.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--only", default="", help="builds whose name contains this; no comparison with the table"
    )
    arguments = parser.parse_args()
    jobs = [job for job in all_builds() if arguments.only in f"{job[0].name} {job[1]}"]
    rows: dict[str, dict[str, int]] = {}
    complaints: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(_compile, jobs)
        for (build, chip), binary in zip(jobs, tqdm(found, total=len(jobs)), strict=True):
            complaints += faults(build, chip, binary)
            rows[f"{build.name} {chip}"] = binary
    if arguments.update:
        if arguments.only:
            version, known = read_table()
            if version != triton.__version__:
                parser.error(f"the table is of triton {version}: update all of it")
            both = known | rows
            names = [f"{build.name} {chip}" for build, chip in all_builds()]
            rows = {name: both[name] for name in names if name in both}
        write_table(rows)
    elif not arguments.only:
        version, known = read_table()
        if version != triton.__version__:
            parser.error(f"the table is of triton {version}, here is {triton.__version__}")
        for name in sorted(set(rows) | set(known)):
            if rows.get(name) != known.get(name):
                complaints.append(f"{name}: {rows.get(name)}, in the table {known.get(name)}")
    print("\n".join(complaints) or f"{len(rows)} binaries, no complaint")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
