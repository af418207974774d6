"""Committed results are whole, and show what the project claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from pag_fast.tools.bench.record import read

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
README = ROOT / "README.md"
# times as fast as stock in eager mode on a CPU, at least: suite, case, factor
CPU = [
    ("step", "SDXL half width", 1.09),
    ("step", "SDXL half width + ControlNet", 1.17),
    ("step", "emoji batch 8", 1.10),
    ("step", "emoji batch 8, CFG off", 1.15),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_of_a_commit_whose_tests_passed(path):
    results = read(path)
    assert results.tests == "passed"
    assert results.rows
    assert results.machine["commit"] and results.machine["dirty"] is False
    assert all(results.machine[name] for name in ("chip", "torch", "diffusers", "date"))


@pytest.mark.parametrize(("suite", "case", "factor"), CPU)
def test_patched_on_a_cpu(suite, case, factor):
    (path,) = [path for path in FILES if path.stem.startswith("cpu")]
    (row,) = [
        row
        for row in read(path).rows
        if (row.suite, row.case, row.variant) == (suite, case, "patched")
    ]
    ratio = row.ratios["stock"]
    assert ratio.median >= factor
    spread = f"{ratio.p20:.2f} to {ratio.p80:.2f}"
    assert f"| **{ratio.median:.2f} ×** | {spread} |" in README.read_text(encoding="utf-8")
    assert row.psnr is None or row.psnr > 80
