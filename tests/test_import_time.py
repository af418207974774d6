"""What ``import pag_fast`` and ``pag-fast --help`` load: nothing that takes a second."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pag_fast

_LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"
_HELP = (
    "import contextlib, io, pag_fast.cli\n"
    "with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):\n"
    "    pag_fast.cli.main(['--help'])\n"
    "assert 'verify' in text.getvalue()\n"
)


def _modules(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_LOADED}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _slow(loaded):
    heavy = ("torch._dynamo", "torch._inductor", "diffusers", "transformers", "accelerate")
    ours = ("pag_fast.analysis.ledger", "pag_fast.analysis.published", "pag_fast.tools")
    below = tuple(f"{name}." for name in heavy)
    return [m for m in loaded if m in (*heavy, *ours) or m.startswith(below)]


@pytest.mark.parametrize("code", ["import pag_fast", _HELP])
def test_neither_pytorch_nor_anything_slow(code):
    loaded = _modules(code)
    assert _slow(loaded) == []
    assert "torch" not in loaded and "numpy" not in loaded


@pytest.mark.parametrize(
    "code",
    [
        "import pag_fast\nfor name in pag_fast.__all__: getattr(pag_fast, name)",
        # settings are checked without the compiler, too
        "from pag_fast import *\n"
        "PatchConfig('mid', compile=CompileConfig(regional=True), schedule=Schedule(stop=0.5))\n"
        "CompileConfig(backend='eager'); Branch('mid', 'soft'); Reuse(every=2)",
    ],
)
def test_public_names_load_no_compiler(code):
    loaded = _modules(code)
    assert "torch" in loaded
    published = [m for m in _slow(loaded) if m != "pag_fast.analysis.published"]
    assert published == []


def test_names_are_where_they_were():
    assert set(pag_fast.__all__) <= set(dir(pag_fast))
    for name in pag_fast.__all__:
        assert getattr(pag_fast, name) is not None
    assert pag_fast.patching.patch is pag_fast.patch
    from pag_fast import Schedule

    assert Schedule is pag_fast.Schedule is pag_fast.settings.schedules.Schedule
    with pytest.raises(AttributeError, match="has no attribute 'pach'"):
        _ = pag_fast.pach


def test_what_a_type_checker_sees_is_what_there_is():
    """The names under TYPE_CHECKING, the table of modules and __all__ say the same."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(pag_fast.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    lazy = {name: module for name, module in pag_fast._MODULES.items() if name in typed}
    assert typed == lazy
    assert {*typed, "__version__"} == set(pag_fast.__all__)
    found = [*Path(pag_fast.__file__).parent.iterdir()]
    assert set(pag_fast._PACKAGES) <= {path.stem for path in found}
    packages = {path.name for path in found if (path / "__init__.py").exists()}
    assert packages <= set(pag_fast._PACKAGES)
