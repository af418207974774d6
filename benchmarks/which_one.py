"""The table of docs/which_one.md: FLOPs of the slowest rank, by family.

    python -m benchmarks.which_one            # fails where page, numbers and counts do not agree
    python -m benchmarks.which_one --update   # counts anew, on the meta device, and writes them

FLOPs of one process are those of ``benchmarks/counts.json``; those of ranks are in
``benchmarks/ranks.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pag_fast.analysis.published import find_card, meta_model
from pag_fast.analysis.ranks import rank_costs, slowest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "which_one.md"
NUMBERS, COUNTS = ROOT / "benchmarks" / "ranks.json", ROOT / "benchmarks" / "counts.json"
BEGIN, END = "<!-- python -m benchmarks.which_one --update writes from here -->", "<!-- to here -->"

FAMILIES = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "PixArtSigmaPAGPipeline",
    "HunyuanDiTPAGPipeline",
    "SanaPAGPipeline",
    "FluxPipeline",
    "Flux2Pipeline",
    "ChromaPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "Lumina2Pipeline",
    "CogView4Pipeline",
    "HiDreamImagePipeline",
    "WanPipeline",
    "HunyuanVideoPipeline",
    "LTXPipeline",
    "CogVideoXPipeline",
)


def counted(name: str) -> dict[str, int]:
    """FLOPs of a step on the slowest of two and of three ranks, one picture at its own size."""
    card = find_card(name)
    model, cfg = meta_model(card), card.guidance[0]
    inputs, layers = card.size.inputs(model), list(card.documented_layers)
    return {
        str(size): slowest(rank_costs(model, layers, inputs, size=size, cfg=cfg))
        for size in (2, 3)
        if cfg or size == 2
    }


def _whole(name: str, counts: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one process, stock and patched."""
    card = find_card(name)
    label = f"{card.name} {','.join(card.documented_layers)}"
    return counts["flops"][label if card.guidance[0] else f"{label}, CFG off"]


def table(numbers: dict[str, dict[str, int]], counts: dict[str, Any]) -> list[str]:
    """Lines of the table in Markdown."""
    lines = [
        "| | throughput: stock / pag_fast, on every GPU "
        "| latency: one process / slowest of 2 ranks | of 3 ranks | uncond |",
        "|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        card, whole, ranks = find_card(name), _whole(name, counts), numbers[name]
        factors = [f"{whole['patched'] / ranks[n]:.2f} ×" if n in ranks else "–" for n in "23"]
        uncond = "in the batch" if card.guidance[0] else "none"
        if card.sequential:
            uncond = "a call of its own"
        share = f"{whole['stock'] / whole['patched']:.2f} ×"
        lines.append(f"| {' | '.join([card.checkpoint, share, *factors, uncond])} |")
    return lines


def page(text: str, numbers: dict[str, dict[str, int]], counts: dict[str, Any]) -> str:
    """The page with its table made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, "", *table(numbers, counts), "", END + tail])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where something is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="count anew and write")
    update = parser.parse_args(argv).update
    counts = json.loads(COUNTS.read_text("utf-8"))
    numbers = {name: counted(name) for name in FAMILIES}
    text = PAGE.read_text("utf-8")
    if update:
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
        PAGE.write_text(page(text, numbers, counts), "utf-8")
        return 0
    same = numbers == json.loads(NUMBERS.read_text("utf-8"))
    return 0 if same and text == page(text, numbers, counts) else 1


if __name__ == "__main__":
    sys.exit(main())
