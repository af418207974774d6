"""Compile every kernel for every chip, without one: ``python -m benchmarks.aot [--update]``.

Reads registers, stack, local and shared memory of each binary and counts the tensor-core
instructions in its assembly. Fails if shared memory is over the chip's limit, if a kernel of a head
dimension of at most 128 spills, if one loads elements of two bytes one by one, if attention takes
too many instructions for a score, if Hopper or Blackwell code does not use their tensor cores, or
if anything differs from the committed table ``benchmarks/aot.json``, which ``--update`` writes.
What is compiled is what the launchers launch: ``benchmarks/aot_calls.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from tqdm.auto import tqdm

from .aot_calls import DTYPES, Build, builds, launched

_ATTENTION = ("perturbed_attention", "noisy_attention")
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
# instructions of a warp for 1,000 scores, at most, in half precision at head dimensions up to 128
MOST: dict[int | str, int] = {80: 500, 86: 500, 89: 500, 90: 400, 100: 500, 120: 900}


def compile_for(build: Build, chip: int | str) -> dict[str, int]:
    """Registers, stack, local and shared memory (bytes), tensor-core instructions, and so on.

    ``narrow``: accesses of two bytes to global memory, on AMD loads. Of attention ``per_1000`` and
    ``barriers``: what the warps of a block execute for 1,000 scores in the main loop.
    """
    made = launched(build, chip)
    source, target, options = made.source(chip)
    compiled = triton.compile(source, target=target, options=options)
    found = {"shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        text = compiled.asm["ptx"]
        found |= _resources(compiled.asm["cubin"])
        for instruction in ("wgmma.mma_async", "tcgen05.mma", "mma.sync"):
            found[instruction] = text.count(instruction)
        found["narrow"] = len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16", text))
    else:
        text = compiled.asm["amdgcn"]
        found["reg"] = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        found["stack"] = max(map(int, re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)))
        found["mfma"] = text.count("v_mfma") + text.count("v_wmma")
        # a result lies there one element a register in every row: that is stored as it lies
        narrow = r"(?:global|buffer)_load_(?:d16_)?(?:ushort|short|u16|b16|i16)"
        found["narrow"] = len(re.findall(narrow, text))
    if (
        build.name.startswith(("perturbed_attention", "noisy_attention"))
        and "cubin" in compiled.asm
    ):
        loop = main_loop(_disassembled(compiled.asm["cubin"]))
        scores = made.options["BLOCK_M"] * made.options["BLOCK_N"]
        found["per_1000"] = round(1000 * len(loop) * made.options["num_warps"] / scores)
        found["barriers"] = sum("BAR" in instruction for instruction in loop)
    return found


def main_loop(sass: str) -> list[str]:
    """The instructions of the loop that has the most products: from a jump back to its target.

    What lies behind the last exit are places where a wait was put aside, and jumps back from there.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    last = max((at for at, text in code if re.search(r"\bEXIT\b", text)), default=0)
    loops: list[list[str]] = [[]]
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at < last:
            loops.append([body for place, body in code if int(jump[1], 16) <= place <= at])
    return max(loops, key=lambda body: sum("MMA" in text for text in body))


def _disassembled(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def _resources(cubin: bytes) -> dict[str, int]:
    text = _cuobjdump(cubin, "--dump-resource-usage")
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # it calls nvdisasm, which lies beside it
        found = subprocess.run(
            [str(tools / "cuobjdump"), *options, file.name],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": f"{tools}:/usr/bin:/bin"},
        )
    return found.stdout


def faults(build: Build, chip: int | str, found: dict[str, int]) -> Iterator[str]:
    """Sentences on what a binary must not be."""
    where = f"{build.name} on {chip}"
    if found["shared"] > SHARED[chip]:
        yield f"{where}: {found['shared']} bytes of shared memory, the chip has {SHARED[chip]}"
    spilled = found.get("stack", 0) + found.get("local", 0)
    if build.head_dim <= 128 and spilled:
        yield f"{where}: spills {spilled} bytes"
    if build.dtype != "fp32" and found["narrow"] > build.narrow:
        yield f"{where}: {found['narrow']} loads or stores of single elements"
    scores = build.name.startswith(("perturbed_attention", "received_attention"))
    if scores and build.dtype != "fp32":
        most = MOST.get(chip, 0)
        if build.head_dim <= 128 and found.get("per_1000", 0) > most:
            yield f"{where}: {found['per_1000']} instructions for 1,000 scores, more than {most}"
        if chip == 90 and not found["wgmma.mma_async"]:
            yield f"{where}: no wgmma"
        if chip == 100 and not found["tcgen05.mma"]:
            yield f"{where}: no tcgen05"
        if isinstance(chip, str) and not found["mfma"]:
            yield f"{where}: no mfma or wmma"


def _compile(job: tuple[str, int | str]) -> dict[str, int]:
    name, chip = job
    return compile_for(_by_name(chip)[name], chip)


@functools.cache
def _by_name(chip: int | str) -> dict[str, Build]:
    return {build.name: build for dtype in DTYPES for build in builds(dtype, chip)}


def all_builds() -> list[tuple[Build, int | str]]:
    """Everything that the package launches, for every chip."""
    return [(build, chip) for chip in SHARED for build in _by_name(chip).values()]


def distinct(jobs: list[tuple[Build, int | str]]) -> dict[str, list[tuple[Build, int | str]]]:
    """Jobs by binary: another layout of the same tensors should be the same one."""
    found: dict[str, list[tuple[Build, int | str]]] = {}
    for build, chip in jobs:
        source, _, options = launched(build, chip).source(chip)
        key = f"{chip} {source.hash()} {sorted(options.items(), key=str)}"
        found.setdefault(key, []).append((build, chip))
    return found


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
    same = list(distinct(jobs).values())
    rows: dict[str, dict[str, int]] = {}
    complaints: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(_compile, [(build.name, chip) for (build, chip), *_ in same])
        for alike, binary in zip(same, tqdm(found, total=len(same)), strict=True):
            for build, chip in alike:
                complaints += faults(build, chip, binary)
                rows[f"{build.name} {chip}"] = binary
    rows = {f"{build.name} {chip}": rows[f"{build.name} {chip}"] for build, chip in jobs}
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
