"""How fast a step could be: ``python -m benchmarks.roofline [--update]``.

Traces a denoising step of each model on the meta device: as diffusers runs it with CFG alone, with
its own PAG, and patched. From FLOPs, bytes and launches of every op it computes the least time on
three GPUs, and compares it with published times. Nothing is timed here. Prints the tables of
``benchmarks/README.md`` and fails if the page has others; ``--update`` writes them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pag_fast.analysis.published import find_card

from .roofline_steps import CHIPS, CLASSES, LAUNCH, PUBLISHED, REST, Steps, steps

PAGE = Path(__file__).with_name("README.md")
PIPELINES = {
    "StableDiffusionXLPAGPipeline": "SDXL 1024²",
    "StableDiffusionXLControlNetPAGPipeline": "SDXL + ControlNet 1024²",
    "StableDiffusionPAGPipeline": "SD 1.5 512²",
    "StableDiffusion3PAGPipeline": "SD3 1024²",
    "PixArtSigmaPAGPipeline": "PixArt-Σ 1024²",
}


def _table(header: str, rows: Iterable[Sequence[object]], text: int = 1) -> str:
    """Markdown; the first ``text`` columns are words, the others numbers."""
    names = header.split(" | ")
    lines = ["| " + header + " |"]
    lines.append("|" + "---|" * text + "--:|" * (len(names) - text))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def _rates_table() -> str:
    rows = []
    for chip in CHIPS:
        for name, rates in (("peak", chip.peak), ("attained", chip.attained)):
            values = (rates.products / 1e12, rates.attention / 1e12, rates.memory / 1e12)
            rows.append(
                (chip.name, name, f"{values[0]:.0f}", f"{values[1]:.0f}", f"{values[2]:.2f}")
            )
    return _table("chip | rates | products, TFLOP/s | attention, TFLOP/s | memory, TB/s", rows, 2)


def _flops_table(counted: dict[str, Steps]) -> str:
    rows = []
    for pipeline, s in counted.items():
        layers = ", ".join(f"`{name}`" for name in find_card(pipeline).documented_layers)
        parts = [s.cfg.flops, s.stock.flops, s.first, s.patched.flops, s.least]
        rows.append((PIPELINES[pipeline], layers, *(f"{x / 1e12:.2f}" for x in parts)))
    header = "model | layers | CFG alone | stock PAG | patched, first step | patched, later | least"
    return _table(header, rows, 2)


def _traffic_table(counted: dict[str, Steps]) -> str:
    rows = []
    for pipeline, s in counted.items():
        kinds = (s.cfg, s.stock, s.patched)
        moved = [f"{x.moved / 1e9:.1f}" for x in kinds]
        rows.append((PIPELINES[pipeline], *(len(x.ops) for x in kinds), *moved))
    header = (
        "model | launches: CFG alone | stock PAG | patched | GB: CFG alone | stock PAG | patched"
    )
    return _table(header, rows)


def _floor_table(counted: dict[str, Steps]) -> str:
    rows = []
    for pipeline, s in counted.items():
        for chip in CHIPS:
            times = [x.at_once(chip.peak) for x in (s.stock, s.patched)]
            for rates in (chip.peak, chip.attained):
                times += [x.op_by_op(rates) for x in (s.cfg, s.stock, s.patched)]
            ratio = f"{times[-2] / times[-1]:.2f} ×"
            rows.append((PIPELINES[pipeline], chip.name, *map(_ms, times), ratio))
    header = (
        "model | chip | at once: stock | patched | op by op: CFG | stock | patched"
        " | attained: CFG | stock | patched | stock ÷ patched"
    )
    return _table(header, rows, 2)


def _launch_table(counted: dict[str, Steps]) -> str:
    rows = []
    for pipeline, s in counted.items():
        pair = (s.stock, s.patched)
        cpu = [_ms(len(x.ops) * cost) for cost in LAUNCH for x in pair]
        even = [
            f"{1e6 * x.op_by_op(chip.attained) / len(x.ops):.0f}" for chip in CHIPS for x in pair
        ]
        rows.append((PIPELINES[pipeline], *cpu, *even))
    low, high = (f"{1e6 * cost:.0f} µs" for cost in LAUNCH)
    header = f"model | CPU at {low}: stock | patched | at {high}: stock | patched"
    header += "".join(f" | {chip.name.split()[0]}: stock | patched" for chip in CHIPS)
    return _table(header, rows)


def _share_table(counted: dict[str, Steps]) -> str:
    rows = []
    for pipeline, s in counted.items():
        for chip in CHIPS[:2]:
            shares = s.patched.shares(chip.attained).values()
            waiting = sum(
                op.seconds(chip.attained)
                for op in s.patched.ops
                if op.seconds(chip.attained) == op.moved / chip.attained.memory
            )
            cells = [*shares, waiting / s.patched.op_by_op(chip.attained)]
            rows.append((PIPELINES[pipeline], chip.name, *(f"{100 * x:.0f}" for x in cells)))
    return _table(" | ".join(["model | chip", *CLASSES, REST, "bound by memory"]), rows, 2)


def _published_table(counted: dict[str, Steps]) -> str:
    rows = []
    for known in (p for p in PUBLISHED if p.pipeline in counted):
        chip = next(chip for chip in CHIPS if chip.name == known.chip)
        peak, attained = (
            counted[known.pipeline].cfg.op_by_op(r) for r in (chip.peak, chip.attained)
        )
        shares = (f"{100 * floor / known.step:.0f} %" for floor in (peak, attained))
        name = PIPELINES[known.pipeline]
        rows.append((name, chip.name, known.setup, known.source, _ms(known.step), *shares))
    header = "model | chip | set-up | source | ms per step | floor ÷ time | attained ÷ time"
    return _table(header, rows, 4)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def tables(counted: dict[str, Steps]) -> dict[str, str]:
    """The page's tables by the names of their markers; every line but a header is of one model."""
    return {
        "rates": _rates_table(),
        "flops": _flops_table(counted),
        "traffic": _traffic_table(counted),
        "floors": _floor_table(counted),
        "launches": _launch_table(counted),
        "shares": _share_table(counted),
        "published": _published_table(counted),
    }


def rewrite(page: str, generated: dict[str, str]) -> str:
    """``page`` with what stands between its markers replaced.

    Raises:
        ValueError: the page lacks the marker of a table.
    """
    for name, table in generated.items():
        pattern = rf"(<!-- roofline: {name} -->\n).*?(\n<!-- end -->)"
        # a function, so that nothing in a table is read as a reference to a group
        page, found = re.subn(pattern, lambda m, t=table: m[1] + t + m[2], page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"The page needs one place '<!-- roofline: {name} -->', not {found}.")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the tables into the page")
    arguments = parser.parse_args()
    generated = tables({pipeline: steps(pipeline) for pipeline in PIPELINES})
    print("\n\n".join(generated.values()))
    before = PAGE.read_text(encoding="utf-8")
    after = rewrite(before, generated)
    if arguments.update:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        sys.exit(f"{PAGE.name} has other numbers: run python -m benchmarks.roofline --update.")


if __name__ == "__main__":
    main()
