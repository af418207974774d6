"""The ahead-of-time gate: it compiles, it complains where it should, and its table is complete."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
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


def test_every_chip_and_head_dimension_is_in_the_table():
    for chip in (80, 86, 90, 100, 120, "gfx942", "gfx1100"):
        for head_dim in (32, 40, 64, 72, 80, 88, 96, 128, 160, 256):
            assert f"perturbed_attention fp16 D={head_dim} joint {chip}" in TABLE
    for chip in (80, 90, 100, 120, "gfx942", "gfx1100"):
        for dtype in ("bf16", "fp32"):
            assert f"perturbed_attention {dtype} D=64 {chip}" in TABLE


def test_nothing_is_loaded_element_by_element():
    """Heads of 40, 72 and 88 channels begin on 16 bytes, though their strides are no multiples of
    16 elements."""
    for chip in (80, 86, 90, 100, 120, "gfx942", "gfx1100"):
        for head_dim in (40, 72, 80, 88):
            for layout in ("", " joint", " fused", " sliced"):
                row = TABLE[f"perturbed_attention fp16 D={head_dim}{layout} {chip}"]
                assert row["narrow"] == row["stack"] == 0


def test_layouts_share_a_binary():
    """As a launch would find it out, from the strides of tensors."""
    found = _elsewhere("""
        import json
        from benchmarks import aot, aot_calls
        found = {}
        for dim in (40, 64, 72, 80, 88):
            builds = [aot_calls.attention_build("fp16", dim, layout=layout)
                      for layout in ("plain", "fused", "sliced")]
            odd = aot_calls.attention_build("fp16", dim + 1)
            jobs = [(build, 90) for build in builds]
            launched = [aot_calls.launched(build, 90).options["UNIT"] for build in (*builds, odd)]
            found[dim] = len(aot.distinct(jobs)), launched
        print(json.dumps(found))
    """)
    assert list(found.values()) == [[1, [8, 8, 8, 1]]] * 5


def test_the_main_loop_is_the_one_with_the_products():
    sass = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
        /*0010*/ FADD R2, R2, R3 ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0040*/ BAR.SYNC 0x0 ;
        /*0050*/ @P1 BRA 0x30 ;
        /*0060*/ EXIT ;
        /*0070*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0080*/ BRA 0x10 ;
    """
    assert [text.split()[0] for text in aot.main_loop(sass)] == [
        "HMMA.16816.F32",
        "BAR.SYNC",
        "@P1",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": 300000}, "300000 bytes of shared memory, the chip has 232448"),
        ({"stack": 8}, "spills 8 bytes"),
        ({"local": 16}, "spills 16 bytes"),
        ({"wgmma.mma_async": 0}, "no wgmma"),
        ({"narrow": 4}, "4 loads or stores of single elements"),
        ({"per_1000": 999}, "999 instructions for 1,000 scores, more than 400"),
    ],
)
def test_faults_are_named(change, message):
    found = {**TABLE["perturbed_attention fp16 D=64 90"], **change}
    assert [message in fault for fault in aot.faults(_build(), 90, found)] == [True]


@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is of triton {VERSION}")
def test_a_binary_compiled_now_is_the_tables():
    """In a process of its own: here kernels are interpreted."""
    name = "combine_guidance fp16 rescale 90"
    found = _elsewhere(f"""
        import json
        from benchmarks import aot
        job = next(j for j in aot.all_builds() if f"{{j[0].name}} {{j[1]}}" == {name!r})
        print(json.dumps(aot.compile_for(*job)))
    """)
    assert found == TABLE[name]


def _elsewhere(code):
    """What a process of its own prints last, where kernels are compiled."""
    paths = f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
