"""Pictures of what is counted: PAG's cost by layer, and the branches of a step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..analysis.costs import LayerCosts
from ..analysis.explanation import Explanation, flops_of, flops_size, flops_unit
from ..models.inputs import Size
from .output import without_matplotlib

OURS, LIGHT, GREY, DARK = "#2a78d6", "#a9c9ef", "#b9bec6", "#333333"
_SMALL, _TEXT = 7.5, 9.0


def save(figure: Any, path: Path) -> None:
    """Write a figure, in the format that the name of the file ends with."""
    figure.savefig(path, dpi=150)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches that needs no window and no global state.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if lacking := without_matplotlib():
        raise ValueError(lacking)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def layers_figure(costs: LayerCosts) -> Any:
    """A bar for each layer: what a step costs with PAG on it alone, in steps without PAG.

    Bars begin at 1, a step without PAG; those of a step that costs less go to the left. A line
    stands where PAG costs as much on any layer if nothing is shared.
    """
    layers = costs.layers
    figure = new_figure(8.5, 1.6 + 0.17 * len(layers))
    axes = figure.subplots()
    places = range(len(layers))
    over = [layer.over_cfg for layer in layers]
    colours = [OURS if layer.default else LIGHT for layer in layers]
    axes.barh(places, [value - 1 for value in over], 0.75, left=1, color=colours)
    for place, layer, value in zip(places, layers, over, strict=True):
        text = f"{value:.3f}" + (", default" if layer.default else "")
        axes.annotate(
            text,
            (max(value, 1.0), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL - 1,
            color=DARK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    unshared = layers[0].unshared_over_cfg
    _line(axes, 1.0, "without PAG", GREY)
    _line(axes, unshared, f"nothing shared: {unshared:g}", DARK)
    if costs.default_over_cfg is not None and sum(layer.default for layer in layers) > 1:
        together = f"default layers together: {costs.default_over_cfg:.3f}"
        _line(axes, costs.default_over_cfg, together, OURS)
    axes.set_yticks(places, [layer.name for layer in layers], fontsize=_SMALL - 1)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(min(0.98, min(over) - 0.02), max(unshared, *over) + 0.14 * unshared)
    cfg = "with CFG" if costs.cfg else "without CFG"
    axes.set_xlabel(f"FLOPs of a step with PAG on one layer, in steps {cfg} and without PAG")
    figure.suptitle(f"{costs.title}, {costs.size}", x=0.01, ha="left", fontsize=_TEXT, color=DARK)
    axes.legend(loc="lower right", fontsize=_SMALL, framealpha=1, edgecolor="none")
    _bare(axes)
    return figure


def explanation_figure(explanation: Explanation) -> Any:
    """Branches as they part from stage to stage, with rows, over FLOPs of a step where known."""
    panels = 2 if explanation.flops else 1
    lanes, stages, apart = _stages(explanation.tree)
    height = 0.55 * max(len(lanes) + len(apart), 2)
    below = 0.5 + 0.8 * len(explanation.flops)
    figure = new_figure(9, 1.0 + height + (below if panels == 2 else 0))
    found = figure.subplots(panels, 1, squeeze=False, height_ratios=[height, below][:panels])
    _draw_tree(found[0, 0], lanes, stages, apart)
    if explanation.flops:
        _draw_flops(found[1, 0], explanation)
    figure.suptitle(
        f"{explanation.pipeline} · {explanation.denoiser}",
        x=0.01,
        ha="left",
        fontsize=_TEXT + 1,
        color=DARK,
    )
    return figure


Stage = tuple[list[list[str]], str]


def _stages(tree: tuple[str, ...]) -> tuple[list[str], list[Stage], list[str]]:
    """Branches at the end, groups of equal ones by stage and where it ends, and other lines."""
    stages: list[Stage] = []
    apart: list[str] = []
    for line in tree:
        match = re.fullmatch(r"(\S+(?: [=|] \S+)*) {3}(until .+|from there on)", line)
        if match is None:
            apart.append(" ".join(line.split()))
            continue
        stages.append(([group.split(" = ") for group in match[1].split(" | ")], match[2]))
    lanes = [name for group in stages[-1][0] for name in group] if stages else []
    return lanes, stages, apart


def _draw_tree(axes: Any, lanes: list[str], stages: list[Stage], apart: list[str]) -> None:
    for column, (groups, end) in enumerate(stages):
        top = 0
        for index, group in enumerate(groups):
            # branches that part later are all in the last group
            last = index == len(groups) - 1
            span = len(lanes) - top if last else len(group)
            colour = OURS if set(group) == {"perturbed"} else LIGHT if len(group) > 1 else GREY
            axes.barh(
                top + span / 2,
                0.98,
                span - 0.12,
                left=column,
                color=colour,
                label=" = ".join(group),
            )
            axes.text(
                column + 0.49,
                top + span / 2,
                " = ".join(group),
                ha="center",
                va="center",
                fontsize=_TEXT,
                color="white" if colour == OURS else DARK,
            )
            top += span
        rows = f"{len(groups)} row{'s'[: len(groups) != 1]} a sample"
        axes.text(column + 0.49, -0.12, rows, ha="center", va="bottom", fontsize=_TEXT)
        axes.text(
            column + 0.49,
            len(lanes) + 0.08,
            end.replace("until ", "until\n"),
            ha="center",
            va="top",
            fontsize=_SMALL - 1.5,
            color=DARK,
        )
    for index, line in enumerate(apart):
        axes.text(0, len(lanes) + index + 0.9, line, fontsize=_TEXT, color=DARK, va="center")
    axes.set_xlim(0, max(len(stages), 1))
    axes.set_ylim(len(lanes) + len(apart) + 0.6, -0.5)
    axes.axis("off")


def _draw_flops(axes: Any, explanation: Explanation) -> None:
    costs = flops_of(explanation)
    unit = flops_unit(costs)
    bars = [
        (f"CFG {cfg}, {name}", value / flops_size(unit), colour)
        for cfg, cost in costs
        for name, value, colour in (
            ("stock", cost.stock, GREY),
            ("patched", cost.patched, OURS),
            ("lower bound", cost.bound, LIGHT),
        )
        if value
    ]
    values = [value for _, value, _ in bars]
    axes.barh(range(len(bars)), values, 0.75, color=[colour for _, _, colour in bars])
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.3f}",
            (value, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=_SMALL)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values))
    size = Size(*explanation.size, explanation.frames)
    axes.set_xlabel(f"{unit} of a step, one sample of {size}: counted, not timed")
    _bare(axes)


def _line(axes: Any, place: float, label: str, colour: str) -> None:
    axes.axvline(place, color=colour, linewidth=1, linestyle="--", label=label)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=_SMALL, colors=DARK)
    axes.xaxis.label.set(fontsize=_TEXT - 0.5, color=DARK)
