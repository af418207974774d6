"""The ahead-of-time gate: it compiles, it complains where it should, and its table is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks import aot

ROOT = Path(__file__).parent.parent
VERSION, TABLE = aot.read_table()


def _build(name="perturbed_attention fp16 D=64"):
    return next(build for build, chip in aot.all_builds() if build.name == name and chip == 90)


def test_table_has_every_build_and_no_fault():
    wanted = {f"{build.name} {chip}": (build, chip) for build, chip in aot.all_builds()}
    assert set(TABLE) == set(wanted)
    faults = [fault for name, job in wanted.items() for fault in aot.faults(*job, TABLE[name])]
    assert faults == []


def test_every_chip_and_dtype_is_in_the_table():
    names = list(TABLE)
    for chip in (80, 86, 89, 90, 100, 120, "gfx942", "gfx1100"):
        for dtype in ("fp16", "bf16", "fp32"):
            for head_dim in (32, 40, 64, 72, 80, 88, 96, 128, 160, 256):
                assert f"perturbed_attention {dtype} D={head_dim} {chip}" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": 300000}, "300000 bytes of shared memory, the chip has 232448"),
        ({"stack": 8}, "spills 8 bytes"),
        ({"local": 16}, "spills 16 bytes"),
        ({"wgmma.mma_async": 0}, "no wgmma"),
    ],
)
def test_faults_are_named(change, message):
    found = {**TABLE["perturbed_attention fp16 D=64 90"], **change}
    assert [message in fault for fault in aot.faults(_build(), 90, found)] == [True]


@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is of triton {VERSION}")
def test_a_binary_compiled_now_is_the_tables():
    """In a process of its own: here kernels are interpreted."""
    name = "combine_guidance fp16 rescale 90"
    code = (
        "import json; from benchmarks import aot\n"
        f"job = next(j for j in aot.all_builds() if f'{{j[0].name}} {{j[1]}}' == {name!r})\n"
        "print(json.dumps(aot.compile_for(*job)))"
    )
    paths = f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == TABLE[name]
