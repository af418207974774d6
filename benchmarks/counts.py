"""What can be counted instead of timed: ``python -m benchmarks.counts``.

FLOPs of a step for every line of the ledger, and its launches and the bytes they move for every
family of denoisers, are the same integers on every machine. Compares them with
``benchmarks/counts.json``: one more than there is a regression. ``--update`` writes that file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.compare import COUNTED, compare_counts
from pag_fast.analysis.kernel_counts import launch_counts
from pag_fast.analysis.ledger import entries
from pag_fast.analysis.published import CARDS
from pag_fast.tools.bench.record import SCHEMA, read_json

TABLE = Path(__file__).parent / "counts.json"
# one for each family of denoisers, and one with a ControlNet
LAUNCHES = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "AnimateDiffPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
)


def collect(pipelines: Sequence[str] = tuple(CARDS), *, progress: bool = True) -> dict[str, Any]:
    """The counts of these pipelines, with the layers that the documentation names."""
    flops: dict[str, dict[str, int]] = {}
    launches: dict[str, dict[str, int]] = {}
    moved: dict[str, dict[str, int]] = {}
    for name in tqdm(pipelines, disable=not progress, unit="pipeline"):
        for line in entries(name):
            cost, cfg = line.cost, line.cfg
            flops[line.label] = {
                "stock": cost.stock,
                "patched": cost.patched,
                "bound": cost.bound,
            }
            if name in LAUNCHES:
                found = launch_counts(name, cfg=cfg)
                launches[line.label] = {"stock": found.stock, "patched": found.patched}
                moved[line.label] = {"stock": found.stock_bytes, "patched": found.patched_bytes}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    report: dict[str, Any] = {"schema": SCHEMA, "versions": versions}
    return {**report, "flops": flops, "launches": launches, "bytes": moved}


def write_counts(report: dict[str, Any], path: Path) -> None:
    """One line an entry, so that a change shows what it changed."""
    parts = [f' "schema": {report["schema"]}', f' "versions": {json.dumps(report["versions"])}']
    for kind in COUNTED:
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in report[kind].items()]
        parts.append(f' "{kind}": {{\n' + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--out", type=Path, help="write the counts to this file too")
    arguments = parser.parse_args(argv)
    found = collect()
    if arguments.out:
        write_counts(found, arguments.out)
    if arguments.update:
        write_counts(found, TABLE)
        return 0
    lines, fine = compare_counts(read_json(TABLE), found)
    print("\n".join(lines))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
