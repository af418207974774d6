"""What the pack's documents say is what the code does."""

from __future__ import annotations

import ast
import re
import sys
import tomllib

import headless
import loaded
import pytest
import test_unet

# isort: split
from comfyui.tools import flops_table

README = (headless.PACK / "README.md").read_text(encoding="utf-8")
CHEAP = ("SD 1.5, middle block", "Flux, single block 0")


@pytest.mark.skipif(not loaded.at_least("0.20.1"), reason="UNets are computed whole")
@pytest.mark.parametrize("title", CHEAP)
def test_the_readme_holds_what_is_counted(title: str) -> None:
    (row,) = (row for row in flops_table.ROWS if row.title == title)
    assert row.line() in README.splitlines()


def test_the_readme_has_every_row_within_its_bound() -> None:
    lines = README.splitlines()
    start = lines.index("|---|---|---|---|") + 1
    assert not lines[start + len(flops_table.ROWS)]
    for row, line in zip(flops_table.ROWS, lines[start:], strict=False):
        title, *numbers = (cell.strip(" *") for cell in line.strip("|").split("|"))
        whole, shared, bound = map(float, numbers)
        assert title == row.title
        assert shared <= bound == row.bound < whole
    # the bounds are those that test_unet.py holds
    named = {(row.model, row.controls, row.cfg, row.bound) for row in flops_table.ROWS}
    for name, _, options, controls, bound in test_unet.ROWS.values():
        assert (name, controls, options.get("cfg", 6.0), bound) in named


def test_the_pack_imports_comfy_and_torch_alone() -> None:
    project = tomllib.loads((headless.PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dependencies"] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    for folder in project["tool"]["comfy"]["includes"]:
        assert any((headless.PACK / folder).iterdir())
    # what is not imported from the standard library, and comes with ComfyUI
    known = {"comfy", "comfy_api", "nodes", "server", "torch"}
    for path in [*headless.PACK.glob("*.py"), *headless.PACK.glob("sharing/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                assert root in known or root in sys.stdlib_module_names, (
                    f"{path.name} imports {name}"
                )
