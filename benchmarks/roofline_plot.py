"""The roofline as a picture: ``python -m benchmarks.roofline_plot [FILE]``.

Drawn from the tables of ``benchmarks/README.md`` alone, which ``make counts`` holds to the code: a
point is a denoising step, its FLOPs over its bytes against its FLOPs over the time that its ops
take one after the other at the rates that real kernels attain. All of it is predicted, and nothing
is timed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pag_fast.tools.plots import DARK, GREY, OURS, new_figure, save

from .roofline import PAGE
from .roofline_steps import CHIPS, Rates

PREDICTED = "predicted from counts and published rates; nothing was timed"
_MARKERS = "os^Dv"
_KINDS = {"stock PAG": GREY, "patched": OURS}


@dataclass(frozen=True)
class Point:
    """A step of a model on a chip: FLOP per byte, and FLOP/s."""

    model: str
    chip: str
    kind: str
    intensity: float
    rate: float


def points(page: str) -> list[Point]:
    """What the page's tables of FLOPs, traffic and floors say of each model and chip."""
    flops = {row[0]: row for row in _rows(page, "flops")}
    traffic = {row[0]: row for row in _rows(page, "traffic")}
    found = []
    for model, chip, *times in _rows(page, "floors"):
        # columns: FLOPs with stock PAG, and patched in a later step; bytes; attained times
        for kind, counted, moved, time in (
            ("stock PAG", flops[model][3], traffic[model][5], times[6]),
            ("patched", flops[model][5], traffic[model][6], times[7]),
        ):
            total = 1e12 * float(counted)
            intensity, rate = total / (1e9 * float(moved)), total / (1e-3 * float(time))
            found.append(Point(model, chip, kind, intensity, rate))
    return found


def roof(rates: Rates, intensity: float) -> float:
    """FLOP/s that a chip can reach at so many FLOP per byte."""
    return min(rates.products, intensity * rates.memory)


def figure(page: str) -> Any:
    """A panel for each chip: its roofs at peak and attained rates, and the points below them."""
    drawn = points(page)
    names = list(dict.fromkeys(point.model for point in drawn))
    out = new_figure(11, 4.6)
    panels = out.subplots(1, len(CHIPS))
    reach = [point.intensity for point in drawn]
    low, high = min(reach) / 3, max(reach) * 1.5
    grid = [low * (high / low) ** (k / 400) for k in range(401)]
    for axes, chip in zip(panels, CHIPS, strict=True):
        for label, rates, style in (("peak", chip.peak, "-"), ("attained", chip.attained, "--")):
            roofs = [roof(rates, x) / 1e12 for x in grid]
            axes.plot(grid, roofs, style, color=DARK, linewidth=1, label=f"roof, {label}")
        here = [point for point in drawn if point.chip == chip.name]
        reached = [point.rate for point in here]
        for point in here:
            axes.scatter(
                [point.intensity],
                [point.rate / 1e12],
                marker=_MARKERS[names.index(point.model)],
                color=_KINDS[point.kind],
                edgecolors="white",
                linewidths=0.4,
                label=f"{point.model}, {point.kind}",
                zorder=3,
            )
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte")
        axes.set_title(f"{chip.name}, predicted", fontsize=9, loc="left")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xticks([100, 200, 400], minor=False)
        axes.set_yticks([100, 150, 200, 300, 400, 600, 800], minor=False)
        axes.minorticks_off()
        axes.set_ylim(
            0.8 * min(roof(chip.attained, low), *reached) / 1e12, 1.1e-12 * chip.peak.products
        )
        axes.tick_params(labelsize=7.5)
    panels[0].set_ylabel("TFLOP/s of a step")
    handles, labels = panels[0].get_legend_handles_labels()
    out.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=4)
    out.suptitle(PREDICTED, fontsize=9, x=0.01, ha="left")
    return out


def _rows(page: str, name: str) -> list[list[str]]:
    """Cells of the lines of a table of the page, without its header."""
    match = re.search(rf"<!-- roofline: {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    if match is None:
        raise ValueError(f"The page has no table {name!r}.")
    lines = [line.strip("|").split("|") for line in match[1].splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in lines]


if __name__ == "__main__":
    save(figure(PAGE.read_text(encoding="utf-8")), Path((sys.argv[1:] or ["roofline.png"])[0]))
