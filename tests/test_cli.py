"""The command line as its users meet it: sentences, places to write, JSON, lines in a log."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import tqdm.auto

from pag_fast import cli
from pag_fast.analysis.explanation import flops_table, flops_unit
from pag_fast.analysis.flops import Cost
from pag_fast.analysis.published import CARDS, find_card, known_names
from pag_fast.cli import main
from pag_fast.tools import load as models
from pag_fast.tools.generate.rows import read_rows
from pag_fast.tools.output import progress, to_json, write_json


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Whatever loads or counts would be a TypeError, which is no sentence."""
    for name in ("emoji", "load", "skeleton"):
        monkeypatch.setattr(models, name, None)


def _refused(capsys, *arguments):
    """The one sentence of a refusal."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pag-fast: ") and line.endswith((".", "?"))
    return line.removeprefix("pag-fast: ")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --pag-scale nan", "--pag-scale must be a number of at least 0, and finite"),
        ("verify --pag-scale -1", "--pag-scale must be a number of at least 0"),
        ("bench --guidance-scale inf", "--guidance-scale must be a number of at least 0"),
        ("verify --guidance-scale five", "got 'five'"),
        ("demo --steps 1", "--steps must be a whole number of at least 2; got 1"),
        ("bench --rounds 0", "--rounds must be a whole number of at least 1; got 0"),
        ("demo --batch -3", "--batch must be a whole number of at least 1; got -3"),
        ("layers emoji --height 0", "--height must be a whole number of at least 1; got 0"),
        ("layers emoji --frames 1.5", "--frames must be a whole number of at least 1; got '1.5'"),
        ("describe --width -64", "--width must be a whole number of at least 1; got -64"),
        ("demo --seed -1", "--seed must be a whole number from 0"),
        ("verify --dtype int8", "invalid choice: 'int8'"),
        ("layers --unheard", "unrecognized arguments: --unheard"),
        ("nothing", "invalid choice: 'nothing'"),
        ("generate --out x", "the following arguments are required: --prompts"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(arguments, message, capsys):
    sentence = _refused(capsys, *arguments.split())
    assert message in sentence
    assert sentence.endswith("--help`.")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    "arguments",
    [
        "demo --out /proc/nowhere",  # nobody may write there, root neither
        "bench --out {file}/below",
        "generate --prompts {file} --out /proc/nowhere",
        "verify --json /proc/x.json",
        "layers emoji --json {folder}/none/x.json",
        "ledger --json {folder}",
        "describe --write {file}/x.py",
        "generate --prompts {folder} --out {folder}",
        "generate --prompts {folder}/none.jsonl --out {folder}",
    ],
)
def test_places_are_tried_before_the_work(arguments, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    arguments = arguments.format(folder=tmp_path, file=file).split()
    assert arguments[-2].startswith("--") and arguments[-1].rpartition("/")[0] in _refused(
        capsys, *arguments
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


@pytest.mark.usefixtures("nothing_loaded")
def test_places_that_can_be_written_are_left_as_they_were(capsys, tmp_path):
    """They are tried, then another option is refused: nothing has been made or changed."""
    (tmp_path / "old.json").write_text("mine")
    for place in ("--out", tmp_path / "a" / "b"), ("--out", tmp_path):
        assert "--seed" in _refused(capsys, "demo", *place, "--seed", "-1")
    for name in ("old.json", "new.json"):
        assert "--steps" in _refused(capsys, "verify", "--json", tmp_path / name, "--steps", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "mine"


# ---- what is loaded ----


def _saved(folder, index=None, part=None):
    """The configurations of a small pipeline, with changes."""
    for file in models.EMOJI.rglob("*.json"):
        copy = folder / file.relative_to(models.EMOJI)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    content = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**content, **(index or {})}))
    if part is not None:
        (folder / "unet" / "config.json").write_text(part)
    return folder


@pytest.mark.parametrize(
    ("index", "part", "message"),
    [
        ({"_class_name": ["a", "b"]}, None, "_class_name is ['a', 'b'], which is no pipeline"),
        ({"_class_name": "UNet2DConditionModel"}, None, "which is no pipeline of diffusers"),
        ({"unet": 7}, None, "says that unet is 7."),
        ({"unet": ["diffusers"]}, None, "says that unet is ['diffusers']."),
        ({}, "[]", "the configuration of its unet holds a list, not an object."),
        ({"_class_name": "StableDiffusionSAGPipeline"}, None, "no layers to choose: it gets no"),
    ],
)
def test_damaged_configurations_are_named(index, part, message, capsys, tmp_path):
    assert main(["layers", str(_saved(tmp_path, index, part))]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert message in sentence and "Error)" not in sentence


@pytest.mark.parametrize("command", ["layers", "verify --pipeline", "demo --pipeline"])
@pytest.mark.parametrize("source", ["./nowhere", "no/such/folder", "/nowhere", "a b/c", "{file}"])
def test_what_can_be_no_id_is_not_looked_for_on_the_hub(
    command, source, capsys, tmp_path, monkeypatch
):
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", None)
    (tmp_path / "file").write_text("")
    source = source.format(file=tmp_path / "file")
    sentence = _refused(capsys, *command.split(), source)
    assert repr(source) in sentence and ("no such folder" in sentence or "a file" in sentence)


def test_the_model_that_ships_is_loaded_without_a_warning_or_a_bar(capsys):
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            models.load(str(models.EMOJI), as_saved=True)
            models.emoji()
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    assert "it/s" not in capsys.readouterr().err
    models.emoji()
    assert logging.is_progress_bar_enabled() and "it/s" not in capsys.readouterr().err


# ---- names ----


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("SanaPAGPipelin", "SanaPAGPipeline"),
        ("WanPipelin", "WanPipeline"),
        ("emoj", None),
        ("nope", None),
        ("StableDiffusionSAGPipeline", "no layers to choose"),
    ],
)
def test_suggestions_are_near_and_each_is_made_once(name, near):
    with pytest.raises(ValueError, match=name) as refused:
        find_card(name)
    sentence = str(refused.value)
    if near is None:
        assert "did you mean" not in sentence
    else:
        assert near in sentence
    offered = sentence.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert len(set(offered)) == len(offered)


def test_names_that_are_listed_are_known_and_listed_once(capsys):
    assert main(["layers"]) == 0
    listed = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(set(listed)) == len(listed) > 60 and set(listed) <= set(known_names())
    assert {find_card(name).pipeline for name in listed} >= {c.pipeline for c in CARDS.values()}


# ---- numbers ----


@pytest.mark.parametrize(
    ("stock", "unit", "printed"),
    [(8.9e12, "TFLOPs", "8.900"), (2.5e9, "GFLOPs", "2.500"), (3.4e6, "MFLOPs", "3.400")],
)
def test_no_table_of_zeros(stock, unit, printed):
    costs = [("a", Cost(int(stock), int(stock), int(stock))), ("b", Cost(10**14, 10**14, 10**14))]
    assert flops_unit(costs) == unit
    assert printed in flops_table(costs, "x")[2]


STRANGE = {"psnr": math.inf, "rows": [math.nan, {"x": -math.inf}], "n": 3, "name": "σ"}


def test_json_has_no_word_for_what_is_no_number(tmp_path):
    def refuse(word):
        raise AssertionError(word)

    write_json(tmp_path / "x.json", STRANGE)
    text = (tmp_path / "x.json").read_text("utf-8")
    read = json.loads(text, parse_constant=refuse)
    assert read == {"psnr": None, "rows": [None, {"x": None}], "n": 3, "name": "σ"}
    assert json.loads(to_json(STRANGE, None)) == read and to_json(STRANGE, None).count("\n") == 1


def test_what_verify_writes_is_json_where_pictures_are_equal(capsys, tmp_path, monkeypatch):
    from pag_fast.analysis import verify

    same = {"largest": 0.0, "relative": 0.0, "psnr": math.inf}
    monkeypatch.setattr(verify, "_compare", lambda out, stock: same)
    assert main(["verify", "--steps", "1", "--json", str(tmp_path / "v.json")]) == 0
    text = (tmp_path / "v.json").read_text("utf-8")
    assert "Infinity" not in text and json.loads(text)["psnr"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x", "pag_scale": NaN}', "NaN is no number"),
        ('{"prompt": "x", "eta": -Infinity}', "-Infinity is no number"),
        ('{"prompt": "x", "pag_scale": -1}', "line 1: pag_scale must be a number of at least 0"),
        ('{"prompt": "x", "guidance_scale": "5"}', "guidance_scale must be a number"),
        ('{"prompt": "\udcff"}', "no text in UTF-8"),
    ],
)
def test_rows_with_scales_that_make_no_sense(row, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(row.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_rows(file, 0)


# ---- terminals, logs and pipes ----


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _count(stream, monkeypatch, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(300, "step", name="demo", **options) as bar:
        for _ in range(300):
            bar.update()
            bar.set_description("stock")
    return stream.getvalue()


def test_a_log_gets_one_line_and_a_terminal_a_bar(monkeypatch):
    line = _count(io.StringIO(), monkeypatch)
    assert line.startswith("demo: 300 steps in ") and line.count("\n") == 1 and "\r" not in line
    assert _count(_Terminal(), monkeypatch).count("\r") > 10
    for stream in (io.StringIO(), _Terminal()):
        assert _count(stream, monkeypatch, show=False) == ""


def test_a_notebook_keeps_its_bar(monkeypatch):
    """There standard error is no terminal either."""
    monkeypatch.setattr(tqdm.auto, "notebook_tqdm", object())
    assert _count(io.StringIO(), monkeypatch).count("\r") > 10


def test_a_run_that_fails_says_nothing_of_an_end(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(RuntimeError), progress(3, "step"):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_a_reader_that_has_gone_is_no_error():
    """As ``pag-fast layers | head -0``, on a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from pag_fast.cli import main; sys.exit(main(['layers']))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "pipe" not in done.stderr


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_env", stop)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == ""


def test_a_file_that_fails_later_is_named(monkeypatch, capsys):
    def fail(arguments):
        raise PermissionError(13, "Permission denied", "weights.bin")

    monkeypatch.setattr(cli, "_env", fail)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == "pag-fast: weights.bin: Permission denied\n"


# ---- without matplotlib ----


def test_bench_prints_its_table_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--steps", "2", "--rounds", "1", "--batch", "1", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "ms per step" in out and "pip install 'pag-fast[bench]'" in out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_the_dtype_has_the_name_that_diffusers_gives_it(monkeypatch):
    import diffusers
    import torch

    for version, name in {"0.35.0": "torch_dtype", "0.40.0.dev0": "dtype", "1.0": "dtype"}.items():
        monkeypatch.setattr(diffusers, "__version__", version)
        assert models.in_dtype(torch.float16) == {name: torch.float16}
