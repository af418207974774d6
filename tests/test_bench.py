"""Measuring: rows and files, turns, variants of a pipeline, ``pag-fast bench`` from end to end."""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import shallow
import torch
from tiny import build, call_kwargs
from torch._dynamo.testing import CompileCounterWithBackend

import pag_fast
from pag_fast.cli import main
from pag_fast.tools.bench import record, report
from pag_fast.tools.bench.record import EQUAL, Results, Spread, machine, read, write
from pag_fast.tools.bench.timing import interleave, make_rows, peak_bytes, seconds, turns
from pag_fast.tools.bench.user import bench_pipeline
from pag_fast.tools.bench.variants import compare_outputs, variants

SD = "StableDiffusionPAGPipeline"


def _rows(**changes):
    samples = {"stock": [3.0, 6.0, 3.3], "patched": [2.0, 3.0, 2.2]}
    options = {"suite": "step", "case": "a case", "settings": {"batch": 2}, "dtype": "float32"}
    return make_rows(samples, **{**options, **changes})


# ---- files ----


def test_files_come_back_as_they_were(tmp_path):
    rows = _rows(peaks={"stock": 1000}, psnrs={"patched": 120.5})
    results = Results(machine(), rows, "passed")
    path = tmp_path / "folder" / "results.json"
    write(results, path)
    assert read(path) == results
    assert json.loads(path.read_text())["schema"] == 1


def test_the_machine_is_named():
    found = machine()
    assert found["chip"]
    assert torch.__version__.startswith(found["torch"])
    assert found["threads"] == torch.get_num_threads()
    assert found["driver"] is None
    assert {"python", "triton", "diffusers", "transformers", "pag_fast", "date"} <= found.keys()
    json.dumps(found)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    """A package inside somebody else's checkout, such as an environment in it, has no commit."""
    package = tmp_path / "checkout" / "pag_fast"
    package.mkdir(parents=True)
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    (package / "file.py").write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    monkeypatch.setattr(record, "_PACKAGE", package)
    assert record._commit() == (head.strip(), False)
    (package / "file.py").write_text("2\n")
    assert record._commit() == (head.strip(), True)
    inner = package.parent / "env" / "pag_fast"
    shutil.copytree(package, inner)
    monkeypatch.setattr(record, "_PACKAGE", inner)
    assert record._commit() == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "could not be read as JSON"),
        ("[]", "holds a JSON list"),
        ('{"schema": 2, "rows": []}', "no results file of schema 1"),
        ('{"schema": 1, "rows": [{}], "machine": {}, "tests": "passed"}', "lacks what schema 1"),
        ('{"schema": 1, "rows": [], "machine": {}, "tests": "green"}', "tests 'green'"),
    ],
)
def test_strange_files(tmp_path, text, message):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="could not be read"):
        read(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


# ---- timing ----


def test_everybody_begins_as_often():
    order = turns(["a", "b", "c"])
    assert [next(order) for _ in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_calls_take_turns():
    ran: list[str] = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    ticks = iter(range(100))

    def clock(call, device):
        call()
        return next(ticks)

    samples = interleave(calls, 2, warmup=1, clock=clock)
    assert "".join(ran) == "abcbcacab"
    # the first three ticks were the warm-up's
    assert samples == {"a": [5, 7], "b": [3, 8], "c": [4, 6]}


def test_seconds_are_seconds():
    assert 0.02 <= seconds(lambda: time.sleep(0.02), "cpu") < 5


def test_ratios_are_of_the_same_round():
    stock, patched = _rows()
    # 1.5, 2 and 1.5; the ratio of the medians would be no round's
    assert patched.ratios["stock"].median == pytest.approx(1.5)
    assert patched.ratios["stock"].p80 == pytest.approx(1.8)
    assert stock.ratios["patched"].median == pytest.approx(1 / 1.5)
    assert patched.seconds == Spread(2.2, pytest.approx(2.08), pytest.approx(2.68))
    assert (patched.rounds, patched.variant) == (3, "patched")
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0)


def test_equal_pictures_have_a_note():
    _, equal = _rows(psnrs={"patched": math.inf})
    assert (equal.psnr, equal.note) == (None, EQUAL)
    _, close = _rows(psnrs={"patched": 99.0})
    assert (close.psnr, close.note) == (99.0, "")


def test_no_memory_is_measured_on_a_cpu():
    assert peak_bytes(lambda: None, "cpu") is None


@pytest.mark.parametrize(("calls", "rounds"), [({}, 1), ({"a": print}, 0)])
def test_nothing_to_time(calls, rounds):
    with pytest.raises(ValueError, match="at least one call, one round"):
        interleave(calls, rounds)


def test_ratios_need_every_round():
    with pytest.raises(ValueError, match="every round"):
        make_rows({"a": [1.0], "b": []}, suite="op", case="c", settings={}, dtype="float32")


# ---- variants ----


def _run(ways, pipe):
    return {name: way(**call_kwargs(SD, pipe)).images for name, way in ways.items()}


def test_variants(snapshot):
    pipe = build(SD)
    before = snapshot(pipe)
    outputs = _run(variants(pipe), pipe)
    assert list(outputs) == ["no PAG", "stock", "patched"]
    peak = outputs["stock"].abs().max().item()
    psnrs = compare_outputs(outputs, peak=peak)
    assert psnrs.keys() == {"patched"}
    assert psnrs["patched"] > 80
    assert compare_outputs({**outputs, "patched": outputs["no PAG"]}, peak=peak)["patched"] < 60
    gc.collect()  # the patched copy stands in front of the model as long as it lives
    assert snapshot(pipe) == before


def test_compiled_variants_keep_their_graphs(snapshot):
    """In turns, each finds the graph it had: nothing is compiled after the first round."""
    pipe, _ = shallow.least(SD)
    before = snapshot(pipe)
    counter = CompileCounterWithBackend("eager")
    ways = variants(pipe, compiled=True, backend=counter)
    assert list(ways)[3:] == ["no PAG compiled", "stock compiled", "patched compiled"]
    first = _run(ways, pipe)
    compiled = counter.frame_count
    assert compiled >= 3
    for _ in range(2):
        again = _run(ways, pipe)
    assert counter.frame_count == compiled
    psnrs = compare_outputs(again, peak=first["stock"].abs().max().item())
    assert psnrs.keys() == {"patched", "stock compiled", "patched compiled"}
    assert min(psnrs.values()) > 80
    del ways
    gc.collect()
    assert snapshot(pipe) == before


def test_only_stock_compiled():
    ways = variants(build(SD), compiled=["stock"], backend="eager")
    assert list(ways) == ["no PAG", "stock", "patched", "stock compiled"]
    assert [name for name, way in ways.items() if way._compiled] == ["stock compiled"]


def test_graphs_are_one_more_variant():
    names = ["no PAG", "stock", "patched", "patched graphs"]
    assert list(variants(build(SD), graphs=True)) == names


def test_a_patched_pipeline_is_refused():
    with pytest.raises(ValueError, match="unpatch"):
        variants(pag_fast.patch(build(SD)))


def test_layers_are_those_asked_for():
    pipe = build(SD)
    ways = variants(pipe, pag_fast.PatchConfig(layers="up_blocks.1"))
    assert all("up_blocks.1" in name for name in ways["stock"].pipe.pag_applied_layers)
    outputs = _run(ways, pipe)
    assert compare_outputs(outputs, peak=outputs["stock"].abs().max().item())["patched"] > 80
    with pytest.raises(ValueError, match="nowhere"):
        variants(pipe, pag_fast.PatchConfig(layers="nowhere"))


# ---- the command ----


@pytest.fixture
def command(tmp_path, capsys):
    def run(*arguments):
        status = main(["bench", "--out", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_bench(command, tmp_path):
    from PIL import Image

    status, out, _ = command(
        *("--steps", "3", "--rounds", "2", "--batch", "2", "--prompt", "red apple"),
        *("--layers", "mid", "--guidance-scale", "1"),
    )
    assert status == 0
    for text in ("ms per step", "s per image", "× stock", "× no PAG", "PSNR, dB"):
        assert text in out
    results = read(tmp_path / "out" / "bench.json")
    assert results.tests == "not run"
    names = ["no PAG", "stock", "patched"]
    assert [row.variant for row in results.rows] == names * 2
    step, image = results.rows[2], results.rows[5]
    assert step.case == "emoji, batch 2: a step"
    assert image.case == "emoji, batch 2: an image"
    # an image is three steps, and a decoder, for two images
    assert image.seconds.median > step.seconds.median
    assert (step.rounds, image.settings["guidance_scale"]) == (2, 1.0)
    # equal bits have no decibels, and some processors give them
    assert image.note == EQUAL if image.psnr is None else image.psnr > 80
    assert set(image.ratios) == {"stock", "no PAG"}
    assert len(set(Image.open(tmp_path / "out" / "bench.png").convert("RGB").getdata())) > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps must be a whole number of at least 2"),
        (["--rounds", "0"], "--rounds must be a whole number of at least 1"),
        (["--batch", "0"], "--batch must be a whole number of at least 1"),
        (["--layers", "nowhere"], "nowhere"),
        (["--pipeline", "no/such/folder/at/all"], "could not be loaded"),
    ],
)
def test_bad_input_is_a_sentence(command, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, error = command(*arguments)
    assert (status, out) == (2, "")
    assert message in error


def test_a_plot_without_matplotlib_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'pag-fast\[bench\]'"):
        report.plot(_rows(), tmp_path / "plot.png")


def test_prompts_are_needed():
    with pytest.raises(ValueError, match="0 prompts"):
        bench_pipeline(build(SD), [], name="tiny")


# ---- tables ----


def test_table():
    lines = report.table(_rows(peaks={"patched": 2**30}, psnrs={"patched": 130.0}))
    assert lines[0].split("  ")[0] == "suite: case, variant"
    assert "step: a case, patched" in lines[-1]
    for text in ("2200.0", "1.50", "1.00", "130.0"):
        assert text in lines[-1]


def test_one_panel_per_case(tmp_path):
    """Two cases make a taller picture than one."""
    from PIL import Image

    heights = []
    for rows in (_rows(), _rows() + _rows(case="another")):
        report.plot(rows, tmp_path / "plot.png", title="a chip")
        heights.append(Image.open(tmp_path / "plot.png").height)
    assert heights[1] > 1.5 * heights[0]
