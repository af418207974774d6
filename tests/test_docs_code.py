"""What pages show runs: Python on tiny models, names of the API, subcommands of the command line.

The blocks of a page run one after the other, as a reader would run them. ``pipe`` is SDXL until the
page loads another one. A block that cannot run here has the reason in a comment in front of it.
"""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import older
import pytest
import torch
from standins import hub, stand_in

import pag_fast
from pag_fast import perturbations
from pag_fast.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_REASON = r"(?:<!-- not run: (.+?) -->\n)?"
_BLOCK = re.compile(_REASON + r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ID = {"ids": lambda page: page.stem}


def _blocks(text):
    """Reasons not to run (empty: it runs) and code."""
    return [(match[1] or "", match[2]) for match in _BLOCK.finditer(text)]


def _run(page, text):
    names = {"pag_fast": pag_fast, "torch": torch, "pipe": stand_in("StableDiffusionXLPAGPipeline")}
    with hub(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="pag_fast")
        for reason, code in _blocks(text):
            if not reason:
                line = text[: text.index(code)].count("\n")
                exec(compile("\n" * line + code, page, "exec"), names)
                _draw(names["pipe"])
    return names


def _draw(pipe):
    """What a block has put on a pipeline shows in a call; compiling it takes a minute."""
    found = getattr(pipe, "_pag_fast", None)
    if found is not None and not found.config.compile:
        pipe("an astronaut")


@older.newest("pages are about a newer one")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if _blocks(page.read_text("utf-8"))], **_ID
)
def test_blocks_run(page):
    _run(page, page.read_text("utf-8"))


def test_every_fence_is_one_that_is_known():
    """Code that is not tagged as Python, or is indented, would go by the tests."""
    for page in PAGES:
        text = page.read_text("utf-8")
        fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(_blocks(text)), page.name
        assert not re.search(r"^ {4}.*(pag_fast\.|import |from_pretrained)", _prose(text), re.M)


def _prose(text):
    return _BLOCK.sub("", text)


def test_reasons_not_to_run_are_few():
    reasons = [reason for page in PAGES for reason, _ in _blocks(page.read_text("utf-8"))]
    given = [reason for reason in reasons if reason]
    assert len(reasons) >= 15 and len(given) <= 4
    # what has no CUDA device is in test_graphs.py, what takes several processes in distributed/
    assert set(given) <= {"needs a CUDA device", "needs several processes"}


@older.newest("pages are about a newer one")
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pag_fast.patched_pipe(pipe)", AttributeError),
        ("pag_fast.patch(pipe, 'blocks.99')", ValueError),
        (
            "from diffusers import FluxPipeline\nFluxPipeline.from_pretrained('nobody/knows')",
            KeyError,
        ),
    ],
)
def test_a_block_that_no_longer_runs_is_seen(code, error):
    with pytest.raises(error):
        _run(Path("page.md"), f"Text.\n\n```python\n{code}\n```\n")


def test_the_api_page_is_complete():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    for path in shown:
        module, name = path.rsplit(".", 1)
        if "guiders" not in module or not older.OLD:
            assert getattr(importlib.import_module(module), name).__doc__
    names = {path.rsplit(".", 1)[1] for path in shown}
    bases = {"AttentionPerturbation", "BlockPerturbation", "Layer", "Perturbation", "Rows"}
    public = {*pag_fast.__all__, *perturbations.__all__, *("PerturbedAttentionGuidance",)}
    assert public - {"__version__", "by_name"} - bases <= names


def _commands(capsys):
    """The subcommands that the help lists, each at the beginning of an indented line."""
    with pytest.raises(SystemExit):
        main(["--help"])
    found = set(re.findall(r"^ {4}([a-z]+) {2,}\S", capsys.readouterr().out, re.MULTILINE))
    assert {"layers", "demo"} <= found
    return found


@pytest.mark.parametrize("page", PAGES, **_ID)
def test_commands_exist(page, capsys):
    text, known = page.read_text("utf-8"), _commands(capsys)
    named = re.findall(r"(?:^ {4}(?:\$ )?|`)pag-fast ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= known


def test_the_command_line_page_names_every_command(capsys):
    page = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    assert set(re.findall(r"^ {4}pag-fast ([a-z]+)", page, re.MULTILINE)) == _commands(capsys)


def test_the_environment_of_the_pages_is_small_and_pinned():
    lines = (ROOT / "constraints" / "docs.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    names = {name.lower() for name, _ in pins}
    assert {"mkdocs", "mkdocs-material", "mkdocstrings-python"} <= names
    assert not names & {"torch", "diffusers", "transformers", "numpy"}
    assert "\nmake docs\n" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_every_defect_on_the_page_has_a_test():
    page = (ROOT / "docs" / "defects.md").read_text("utf-8")
    numbers = re.findall(r"^\| ([BS]\d+) \|", page, re.MULTILINE)
    assert numbers == [*(f"B{i}" for i in range(1, 21)), *(f"S{i}" for i in range(1, 7))]
    files = (ROOT / "tests").glob("test_defects*.py")
    tests = "\n".join(path.read_text("utf-8") for path in files)
    named = {name.upper() for name in re.findall(r"[_ ](b\d+|B\d+)(?![0-9])", tests)}
    assert {name for name in numbers if name[0] == "B"} <= named
