"""Committed results are whole, and show what the project claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from pag_fast.tools.bench.record import read

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
PAGE = ROOT / "docs" / "benchmarks.md"
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
    assert f"| **{ratio.median:.2f} ×** | {spread} |" in PAGE.read_text(encoding="utf-8")
    assert row.psnr is None or row.psnr > 80


def test_the_readme_quotes_them():
    readme = README.read_text(encoding="utf-8")
    (path,) = [path for path in FILES if path.stem.startswith("cpu")]
    rows = {(row.case, row.variant): row for row in read(path).rows if row.suite == "step"}
    sdxl = rows["SDXL half width", "patched"].ratios["stock"]
    demo = rows["emoji batch 8", "patched"].ratios["stock"]
    quoted = f"**{sdxl.median:.2f} ×** as fast as stock PAG ({sdxl.p20:.2f} to {sdxl.p80:.2f})"
    assert quoted in readme and f"the demo's {demo.median:.2f} ×" in readme
    # the day that a GPU's results are committed, this sentence goes
    measured = any(not path.stem.startswith("cpu") for path in FILES)
    assert ("No GPU times have been measured yet" in readme) == (not measured)
