"""The roofline page: its tables are what the code computes, and floors obey simple facts."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import Path

import pytest
from shallow_cards import shallow_card

from benchmarks import roofline, roofline_steps
from benchmarks.roofline_steps import CHIPS, Op, Rates, Step
from pag_fast.analysis.kernel_counts import launch_counts
from pag_fast.analysis.ledger import entry
from pag_fast.analysis.published import CARDS

# the fastest to count; `make counts` compares the whole page
QUICK = ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"]
PLAIN = Rates(products=10.0, attention=5.0, memory=2.0)

DEV = (Path(__file__).parent.parent / "constraints" / "dev.txt").read_text("utf-8").split()
VERSIONS = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
# another version of diffusers or torch may launch other ops; "2.13.0+cpu" is 2.13.0
of_dev = pytest.mark.skipif(
    any(f"{name}=={v.partition('+')[0]}" not in DEV for name, v in VERSIONS.items()),
    reason="the page is that of the versions in constraints/dev.txt",
)


@functools.cache
def _steps(pipeline):
    return roofline_steps.steps(pipeline)


def _block(page, name):
    return re.search(rf"<!-- roofline: {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1]


def _lacking(page):
    """Lines that the code writes for the quick models and that the page does not have."""
    generated = roofline.tables({pipeline: _steps(pipeline) for pipeline in QUICK})
    lines = [(name, line) for name, table in generated.items() for line in table.splitlines()]
    return [(name, line) for name, line in lines if line not in _block(page, name).splitlines()]


@of_dev
def test_the_page_has_the_tables_of_the_code():
    page = roofline.PAGE.read_text(encoding="utf-8")
    assert not _lacking(page), "run python -m benchmarks.roofline --update"
    for label in roofline.PIPELINES.values():
        for name in ("flops", "traffic", "floors", "launches", "shares"):
            assert f"| {label} |" in _block(page, name)


@of_dev
def test_a_stale_page_is_noticed():
    page = roofline.PAGE.read_text(encoding="utf-8")
    launches = len(_steps(QUICK[0]).patched.ops)
    stale = page.replace(f"| {launches} |", f"| {launches + 1} |")
    assert {name for name, _ in _lacking(stale)} == {"traffic"}


def test_steps_are_those_of_the_ledger_and_the_launch_counts(monkeypatch):
    pipeline = "StableDiffusionControlNetPAGPipeline"
    monkeypatch.setitem(CARDS, pipeline, shallow_card(pipeline))
    roofline_steps._denoiser.cache_clear()
    steps, cost, counts = (
        roofline_steps.steps(pipeline),
        entry(pipeline).cost,
        launch_counts(pipeline),
    )
    roofline_steps._denoiser.cache_clear()
    assert (steps.stock.flops, steps.first, steps.least) == (cost.stock, cost.patched, cost.bound)
    assert (len(steps.stock.ops), steps.stock.moved) == (counts.stock, counts.stock_bytes)
    assert (len(steps.patched.ops), steps.patched.moved) == (counts.patched, counts.patched_bytes)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("pipeline", QUICK)
def test_floors(pipeline, chip):
    steps = _steps(pipeline)
    for step in (steps.cfg, steps.stock, steps.patched):
        assert step.at_once(chip.peak) >= step.flops / chip.peak.products > 0
        assert step.op_by_op(chip.peak) >= step.at_once(chip.peak)
        assert step.op_by_op(chip.attained) > step.op_by_op(chip.peak)
        assert sum(step.shares(chip.peak).values()) == pytest.approx(1)
    for rates in (chip.peak, chip.attained):
        assert steps.cfg.op_by_op(rates) < steps.patched.op_by_op(rates)
        assert steps.patched.op_by_op(rates) < steps.stock.op_by_op(rates)
    assert len(steps.patched.ops) <= len(steps.stock.ops)


def test_an_op_takes_the_longer_of_its_two_times():
    assert Op("aten::mm", 100, 2).seconds(PLAIN) == 10
    assert Op("aten::mm", 100, 40).seconds(PLAIN) == 20
    assert Op("attention", 100, 2).seconds(PLAIN) == 20
    step = Step([Op("aten::mm", 100, 2), Op("aten::add", 0, 40)])
    assert (step.op_by_op(PLAIN), step.at_once(PLAIN)) == (30, 21)
    assert step.shares(PLAIN) == {
        "matrix products": 1 / 3,
        "convolutions": 0,
        "attention": 0,
        "norms": 0,
        roofline_steps.REST: 2 / 3,
    }


def test_chips_attain_less_than_their_peak():
    for chip in CHIPS:
        for name in ("products", "attention", "memory"):
            assert 0.4 < getattr(chip.attained, name) / getattr(chip.peak, name) < 1


def test_published_times_are_above_the_floor():
    """A time below it would mean that the floor or the citation is wrong."""
    known = [p for p in roofline_steps.PUBLISHED if p.pipeline in QUICK]
    assert known
    for published in known:
        chip = next(chip for chip in CHIPS if chip.name == published.chip)
        assert _steps(published.pipeline).cfg.flops / chip.peak.products < published.step


def test_a_page_without_a_marker_is_refused():
    with pytest.raises(ValueError, match="roofline: rates"):
        roofline.rewrite("nothing", {"rates": "| a |"})
    page = "<!-- roofline: rates -->\nold\n<!-- end -->\nkept"
    new = roofline.rewrite(page, {"rates": r"| \1 |"})
    assert new == "<!-- roofline: rates -->\n| \\1 |\n<!-- end -->\nkept"
