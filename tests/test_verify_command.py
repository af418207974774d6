"""``pag-fast verify`` takes a pipeline of anybody's, and names what is wrong in its arguments."""

from __future__ import annotations

import inspect
import io
import json
import sys

import diffusers
import pytest

from pag_fast.cli import main


def test_command(capsys, tmp_path):
    file = tmp_path / "v.json"
    assert main(["verify", "--steps", "2", "--layers", "mid", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "StableDiffusionPAGPipeline: equal but for rounding" in text
    assert "compared with diffusers' own pipeline" in text and "steps: shared 2" in text
    assert json.loads(file.read_text("utf-8"))["ok"] is True


class _Stream(io.TextIOWrapper):
    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_report_in_an_encoding_that_has_not_all_its_characters(encoding, monkeypatch, tmp_path):
    """As in a Windows console, or in a pipe where the locale is C."""
    file = tmp_path / "x.json"
    for command in (["verify", "--steps", "1"], ["explain"], ["layers", "emoji"]):
        out = _Stream(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert main([*command, "--json", str(file)]) == 0
        assert "StableDiffusionPAGPipeline" in out.shown() and json.loads(file.read_text("utf-8"))
        assert encoding != "ascii" or "?" in out.shown()
        file.unlink()


def test_what_was_written_is_there_where_nobody_can_be_told(monkeypatch, tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    for command in (["verify", "--steps", "1"], ["explain"], ["layers", "emoji"]):
        file = tmp_path / f"{command[0]}.json"
        assert main([*command, "--json", str(file)]) == 2
        assert json.loads(file.read_text("utf-8"))


def test_command_with_a_pipeline_of_ones_own(capsys, tmp_path):
    """The class that was saved is what is verified; the emoji model without its PAG, here."""
    from pag_fast.tools.load import emoji

    parts = emoji().components
    names = inspect.signature(diffusers.StableDiffusionPipeline.__init__).parameters
    pipe = diffusers.StableDiffusionPipeline(
        **{name: part for name, part in parts.items() if name in names},
        requires_safety_checker=False,
    )
    pipe.save_pretrained(tmp_path)
    run = ["verify", "--pipeline", str(tmp_path), "--steps", "1", "--guidance-scale", "3"]
    assert main([*run, "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "StableDiffusionPipeline: equal" in text and "has no PAG itself" in text
    assert "device cpu, pag_fast" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be a whole number of at least 1"),
        (["--pag-scale", "nan"], "--pag-scale must be a number of at least 0"),
        (["--guidance-scale", "inf"], "--guidance-scale must be a number of at least 0"),
        (["--layers", "nowhere"], "'nowhere'"),
        (["--layers", ""], "layer's name is empty"),
        (["--pipeline", "/no/such/folder"], "could not be loaded as a pipeline"),
        (["--json", "/no/such/x.json"], "does not exist"),
    ],
)
def test_bad_input_is_a_sentence(arguments, message, capsys):
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
