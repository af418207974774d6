"""Rows as a table for the terminal, and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...analysis.explanation import table as text_table
from ..plots import DARK, GREY, OURS, new_figure, save
from .record import Row

_PANEL, _BAR = 0.75, 0.36  # inches: what is around the bars of a case, and a bar


def baselines(rows: Iterable[Row]) -> list[str]:
    """Variants that are not ours, in the order in which they appear."""
    names = dict.fromkeys(row.variant for row in rows)
    return [name for name in names if not name.startswith("patched")]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table: times of every row and its speed against each baseline of its case."""
    against = baselines(rows)
    header = ["suite: case, variant", "ms", "p20 to p80", *(f"× {name}" for name in against)]
    lines = []
    for row in rows:
        milliseconds = [1e3 * x for x in (row.seconds.median, row.seconds.p20, row.seconds.p80)]
        median, p20, p80 = (f"{x:.{3 if x < 1 else 1}f}" for x in milliseconds)
        ratios = [_ratio(row, name) for name in against]
        lines.append(
            [
                f"{row.suite}: {row.case}, {row.variant}",
                median,
                f"{p20} to {p80}",
                *ratios,
                *_tail(row),
            ]
        )
    return text_table([*header, "peak, GiB", "PSNR, dB"], lines)


def user_table(rows: Sequence[Row]) -> list[str]:
    """Lines of the table of ``pag-fast bench``: steps and images of one pipeline side by side."""
    half = len(rows) // 2
    steps, images = rows[:half], rows[half:]
    against = baselines(images)
    lines = [
        [
            image.variant,
            f"{1e3 * step.seconds.median:.1f}",
            f"{image.seconds.median:.3f}",
            *(_ratio(image, name) for name in against),
            *_tail(image),
        ]
        for step, image in zip(steps, images, strict=True)
    ]
    header = ["variant", "ms per step", "s per image", *(f"× {name}" for name in against)]
    return text_table([*header, "peak, GiB", "PSNR, dB"], lines)


def _ratio(row: Row, other: str) -> str:
    if other == row.variant:
        return "1"
    return f"{row.ratios[other].median:.2f}" if other in row.ratios else ""


def _tail(row: Row) -> list[str]:
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    return [peak, row.note or ("" if row.psnr is None else f"{row.psnr:.1f}")]


def plot(rows: Sequence[Row], path: Path, *, title: str = "") -> None:
    """Write a picture: a panel per case, a bar per variant, whiskers from p20 to p80.

    Raises:
        ValueError: matplotlib is not installed.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    heights = [_PANEL + _BAR * len(members) for members in cases.values()]
    figure = new_figure(8, sum(heights) + 0.4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=DARK)
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (case, members) in zip(panels, cases.items(), strict=True):
        _draw(panel, case, members)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _draw(panel: Any, case: str, rows: Sequence[Row]) -> None:
    spreads = [row.seconds for row in rows]
    unit, scale = ("ms", 1e3) if max(s.median for s in spreads) < 1 else ("s", 1.0)
    medians = [scale * s.median for s in spreads]
    whiskers = [
        [scale * (s.median - s.p20) for s in spreads],
        [scale * (s.p80 - s.median) for s in spreads],
    ]
    colours = [OURS if row.variant.startswith("patched") else GREY for row in rows]
    panel.barh(range(len(rows)), medians, 0.7, color=colours)
    panel.errorbar(
        medians, range(len(rows)), xerr=whiskers, fmt="none", ecolor=DARK, elinewidth=1, capsize=3
    )
    panel.set_yticks(range(len(rows)), [row.variant for row in rows])
    panel.invert_yaxis()
    ends = [scale * s.p80 for s in spreads]
    for index, (row, median, end) in enumerate(zip(rows, medians, ends, strict=True)):
        text = f"{median:.3g} {unit}"
        if row.variant.startswith("patched") and "stock" in row.ratios:
            text += f", {row.ratios['stock'].median:.2f} × as fast as stock"
        panel.annotate(
            text, (end, index), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    # room for the longest text behind the longest bar
    panel.set_xlim(0, 1.45 * max(ends))
    panel.set_title(f"{case}, {unit}", loc="left", fontsize=10, color=DARK)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(labelsize=8.5, colors=DARK)
