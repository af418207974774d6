"""Pictures show the numbers that they are made from."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import doc_plots
import pytest

import pag_fast
from benchmarks import roofline, roofline_plot, roofline_steps
from pag_fast.analysis.costs import LayerCost, LayerCosts
from pag_fast.analysis.explanation import Explanation, ModelCall, Predicted
from pag_fast.cli import main
from pag_fast.models.inputs import Size
from pag_fast.tools import load as models
from pag_fast.tools import plots

COSTS = LayerCosts(
    "A pipeline",
    Size(64, 64),
    True,
    (
        LayerCost("down.attn1", 1.4, 1.5, False),
        LayerCost("mid.attn1", 1.25, 1.5, True),
        LayerCost("up.attn1", 0.99, 1.5, True),
    ),
    "a paper",
    1.3,
)
TREE = (
    "uncond = cond = perturbed   until down.attn2",
    "uncond | cond = perturbed   until mid.attn1",
    "uncond | cond | perturbed   from there on",
)
EXPLANATION = Explanation(
    pipeline="APipeline",
    denoiser="UNet",
    is_patched=True,
    backend="auto",
    layers=("mid.attn1",),
    fork="mid.attn1",
    tree=TREE,
    sites=(),
    calls=(ModelCall("UNet", True, 3, "1 → 2 → 3"),),
    flops=(Predicted(True, 3_000_000_000, 2_250_000_000, 2_200_000_000),),
    size=(64, 64),
)


def _bars(axes):
    """(left, right, top, bottom, colour) of each bar."""
    return [
        (p.get_x(), p.get_x() + p.get_width(), p.get_y(), p.get_y() + p.get_height())
        for p in axes.patches
    ]


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def _colours(axes):
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_facecolor()) for patch in axes.patches]


def test_a_bar_for_each_layer_is_as_long_as_it_costs():
    (axes,) = plots.layers_figure(COSTS).axes
    ends = [(left, right) for left, right, *_ in _bars(axes)]
    # a bar to the left has a width below zero
    assert ends == [(1, pytest.approx(x.over_cfg)) for x in COSTS.layers]
    assert _colours(axes) == [plots.LIGHT, plots.OURS, plots.OURS]
    assert [label.get_text() for label in axes.get_yticklabels()] == [x.name for x in COSTS.layers]
    assert _texts(axes) == ["1.400", "1.250, default", "0.990, default"]
    low, high = axes.get_xlim()
    assert low < 0.99 and high > 1.5
    lines = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    assert lines["default layers together: 1.300"] == 1.3
    assert lines["nothing shared: 1.5"] == 1.5 and lines["without PAG"] == 1.0
    assert "with CFG" in axes.get_xlabel()


def test_a_choice_of_one_layer_or_none_has_no_line_of_its_own():
    for costs in (
        replace(COSTS, default_over_cfg=None),
        replace(COSTS, layers=COSTS.layers[:2]),
    ):
        labels = [line.get_label() for line in plots.layers_figure(costs).axes[0].lines]
        assert len(labels) == 2 and not any("default" in label for label in labels)


def _columns(axes):
    """Labels of the bands of each stage, from top to bottom, and what they cover."""
    found = {}
    for bar, container in zip(_bars(axes), axes.containers, strict=True):
        found.setdefault(round(bar[0]), []).append((container.get_label(), bar[2], bar[3]))
    return [found[column] for column in sorted(found)]


def test_branches_part_where_the_tree_says():
    tree, flops = plots.explanation_figure(EXPLANATION).axes
    columns = _columns(tree)
    drawn = [" | ".join(label for label, *_ in column) for column in columns]
    assert drawn == [line.partition("   ")[0] for line in TREE]
    for column in columns:
        # bands are one below the other and together as high as three branches
        edges = [edge for _, top, bottom in column for edge in (top, bottom)]
        assert edges == sorted(edges) and edges[0] < 0.1 and edges[-1] > 2.9
    texts = _texts(tree)
    assert [t for t in texts if "row" in t] == ["1 row a sample", "2 rows a sample"] + [
        "3 rows a sample"
    ]
    assert "until\nmid.attn1" in texts and "from there on" in texts
    rights = [right for _, right, *_ in _bars(flops)]
    assert rights == pytest.approx([3.0, 2.25, 2.2])
    assert _texts(flops) == ["3.000", "2.250", "2.200"]
    assert flops.get_xlabel().startswith("GFLOPs") and "not timed" in flops.get_xlabel()


def test_several_branches_and_calls_of_their_own():
    tree = (
        "cond = perturbed   until blocks.1",
        "cond | perturbed | perturbed   from there on",
        "uncond             a call of its own",
    )
    (axes,) = plots.explanation_figure(replace(EXPLANATION, tree=tree, flops=())).axes
    first, last = _columns(axes)
    assert [label for label, *_ in last] == ["cond", "perturbed", "perturbed"]
    ((label, top, bottom),) = first
    assert label == "cond = perturbed" and bottom == pytest.approx(last[-1][2])
    assert "uncond a call of its own" in _texts(axes)


def test_a_tree_in_words_is_shown_as_words():
    words = ("one pass of a step",)
    (axes,) = plots.explanation_figure(replace(EXPLANATION, tree=words, flops=())).axes
    assert _bars(axes) == [] and _texts(axes) == ["one pass of a step"]


# ---- the commands ----


def test_layers_draws_what_it_prints(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append((figure, path)))
    file = tmp_path / "x.json"
    arguments = ["layers", "emoji", "--json", str(file), "--plot", str(tmp_path / "x.png")]
    assert main(arguments) == 0
    ((figure, path),) = figures
    assert path == tmp_path / "x.png"
    data = json.loads(file.read_text("utf-8"))
    drawn = [right for _, right, *_ in _bars(figure.axes[0])]
    assert drawn == pytest.approx([layer["over_cfg"] for layer in data["layers"]])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_explain_counts_from_configurations_and_draws(suffix, capsys, tmp_path):
    """The command on a folder without weights says what explain says of the pipeline."""
    for file in models.EMOJI.rglob("*.json"):
        copy = tmp_path / "model" / file.relative_to(models.EMOJI)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    plot, data = tmp_path / f"x.{suffix}", tmp_path / "x.json"
    options = ["--layers", "mid", "--plot", str(plot), "--json", str(data)]
    assert main(["explain", "--pipeline", str(tmp_path / "model"), *options]) == 0
    text = capsys.readouterr().out
    with pag_fast.patched(models.emoji(), "mid") as pipe:
        explanation = pag_fast.explain(pipe)
    found, whole = json.loads(data.read_text("utf-8")), explanation.as_dict()
    # weights that are not there are neither fused nor called offloaded
    assert found.pop("launches") == found.pop("findings") == whole.pop("findings") == []
    assert whole.pop("launches") and "offloaded" not in text
    assert "explain(pipe)" in found.pop("notes")[-1] and whole.pop("notes") == []
    assert found == whole and all(line in text for line in explanation.tree)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert plot.read_bytes().startswith(start)


@pytest.mark.parametrize("command", ["layers emoji", "explain"])
def test_pictures_that_cannot_be_drawn_are_refused_first(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "emoji", None)
    for name, message in (("x.gif", "has to end with one of .png, .svg, .pdf"), ("no/x.png", "no")):
        assert main([*command.split(), "--plot", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command.split(), "--plot", str(tmp_path / "x.png")]) == 2
    assert re.search(r"matplotlib.*pip install 'pag-fast\[bench\]'", capsys.readouterr().err)
    with pytest.raises(ValueError, match="matplotlib"):
        plots.layers_figure(COSTS)


# ---- the roofline ----


def test_the_roofline_draws_the_pages_numbers():
    """SDXL on an H100 by hand from the page's tables; all points are below the peak's roof."""
    page = roofline.PAGE.read_text("utf-8")
    figure = roofline_plot.figure(page)
    assert "predicted" in figure.get_suptitle() and "nothing was timed" in figure.get_suptitle()
    chips = dict(zip((chip.name for chip in roofline_steps.CHIPS), figure.axes, strict=True))
    drawn = {
        (name, dots.get_label()): dots.get_offsets()[0]
        for name, axes in chips.items()
        for dots in axes.collections
    }
    assert len(drawn) == len(roofline_steps.CHIPS) * len(roofline.PIPELINES) * 2
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| SDXL 1024² |")
    ]
    floor = next(row for row in cells if row[1] == "H100 SXM" and len(row) == 11)
    flops = next(row for row in cells if row[1] == "`mid`")
    moved = next(row for row in cells if row[1].isdigit() and len(row) == 7)
    for kind, total, gigabytes, ms in (
        ("stock PAG", flops[3], moved[5], floor[8]),
        ("patched", flops[5], moved[6], floor[9]),
    ):
        x, y = drawn["H100 SXM", f"SDXL 1024², {kind}"]
        assert x == pytest.approx(1e3 * float(total) / float(gigabytes))
        assert y == pytest.approx(1e3 * float(total) / float(ms))
    for chip in roofline_steps.CHIPS:
        assert "predicted" in chips[chip.name].get_title("left")
        for (name, _), (x, y) in drawn.items():
            if name == chip.name:
                assert y * 1e12 < roofline_plot.roof(chip.peak, x)
        (peak, attained) = chips[chip.name].lines
        for line, rates in ((peak, chip.peak), (attained, chip.attained)):
            ends = [(x, y) for x, y in zip(*line.get_data(), strict=True)]
            assert ends[0][1] == pytest.approx(ends[0][0] * rates.memory / 1e12)
            assert ends[-1][1] == pytest.approx(rates.products / 1e12)


def test_a_page_without_its_tables_is_refused():
    with pytest.raises(ValueError, match="no table 'flops'"):
        roofline_plot.points("nothing")


@pytest.mark.parametrize("name", doc_plots.PLOTS)
def test_plots_of_the_documentation_show_the_numbers_of_the_code(name):
    _, numbers = doc_plots.PLOTS[name]()
    assert doc_plots.stored(name) == json.loads(json.dumps(numbers)), "run make plots"
