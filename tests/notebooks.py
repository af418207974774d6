"""Runs a notebook without Jupyter: its cells in one namespace, and what each prints and shows.

``make notebook`` runs that of ``examples/notebook`` and stores what it shows.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook" / "perturbed_attention.ipynb"


def load(path: Path = NOTEBOOK) -> dict[str, Any]:
    """A notebook as it is stored."""
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _shown(value: Any) -> dict[str, Any]:
    """What a notebook shows of the value of a cell's last line."""
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_png_"):
        data["text/plain"] = ["<picture>"]
        data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def _cell(source: str, name: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    outputs = []
    if printed.getvalue():
        text = _lines(printed.getvalue())
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    return outputs + ([] if value is None else [_shown(value)])


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each cell with code."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_cell("".join(cell["source"]), f"cell {i}", names) for i, cell in enumerate(cells)]


def main() -> None:
    notebook = load()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, outputs) in enumerate(zip(cells, run(notebook), strict=True), start=1):
        cell.update(execution_count=count, outputs=outputs)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
