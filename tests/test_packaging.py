"""What the package ships, and what importing it must not do."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import dist
import pytest
import setuptools
import yaml

import pag_fast

ROOT = Path(__file__).resolve().parent.parent
EMOJI = "pag_fast/assets/emoji/"
SHIPPED = (ROOT / "pag_fast", ROOT / "kernels" / "torch-ext")


def _listed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The packages that setup.py hands to setuptools, and their folders."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = given["package_dir"]
    return {name: ROOT / folders[name] for name in given["packages"]}


@pytest.fixture
def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("pag-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pag-fast is not installed: pip install -e .")


def _run(code: str) -> str:
    """Output of ``code`` in a fresh interpreter that starts in the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_is_listed(monkeypatch):
    """A folder that setup.py leaves out works in a checkout and is missing from the wheel."""
    folders = {path.parent for top in SHIPPED for path in top.rglob("*.py")}
    assert set(_listed(monkeypatch).values()) == folders
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []


def test_folders_fit_their_import_names(monkeypatch):
    listed = _listed(monkeypatch)
    for name, folder in listed.items():
        parent, _, last = name.rpartition(".")
        assert folder.name == last
        assert not parent or folder.parent == listed[parent]
    assert {name.partition(".")[0] for name in listed} <= {"pag_fast", "pag_fast_kernels"}


def test_kernels_is_not_a_package():
    """transformers and diffusers probe for a package ``kernels``: ours would be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_imports_kernels():
    """``import kernels`` would find the folder instead of the package where that is missing."""
    found = []
    for path in (p for top in SHIPPED for p in top.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(name.partition(".")[0] == "kernels" for name in names):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_import_needs_neither_triton_nor_a_gpu():
    """On a machine without a GPU a CUDA call may fail unseen: calls are what is counted."""
    output = _run(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "calls = []\n"
        "torch.cuda._lazy_init = lambda: calls.append('_lazy_init')\n"
        "def count(name, real):\n"
        "    def counted(*args):\n"
        "        caller = sys._getframe(1).f_globals['__name__']\n"
        "        if caller.startswith('pag_fast'): calls.append(f'{name} by {caller}')\n"
        "        return real(*args)\n"
        "    setattr(torch.cuda, name, counted)\n"
        "for name in ('is_available', 'device_count', 'current_device'):\n"
        "    count(name, getattr(torch.cuda, name))\n"
        "import pag_fast, pag_fast.cli\n"
        "print(calls, pag_fast.__version__)"
    )
    assert output.split() == ["[]", pag_fast.__version__]


def test_installed_version(installed):
    assert installed.version == pag_fast.__version__ == pag_fast.version.__version__


def test_version_is_read_from_the_package():
    """pyproject.toml names the attribute, so that no second copy of the number can go stale."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["project"]["dynamic"] == ["version"]
    assert "version" not in config["project"]
    attribute = config["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "pag_fast.version.__version__"


def test_console_script(installed):
    (script,) = installed.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("pag-fast", "pag_fast.cli:main")
    assert callable(script.load())


def test_the_wheel_holds_the_shipped_model_its_licence_and_attribution(tmp_path):
    """``pag-fast demo`` has to find it after a plain ``pip install .``, without the checkout."""
    out = tmp_path / "out"
    out.mkdir()
    sdist, built = dist.build(out, tmp_path)
    dist.check_metadata(built)
    with zipfile.ZipFile(built) as wheel:
        held = set(wheel.namelist())
        (name,) = (n for n in held if n.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode("utf-8")
        folder = name.removesuffix("METADATA") + "licenses/"
        licences = [wheel.read(folder + x).decode() for x in ("LICENSE", EMOJI + "LICENSE")]
        beside = wheel.read(EMOJI + "LICENSE").decode()
        card = wheel.read(EMOJI + "README.md").decode("utf-8")
    files = [f for f in (ROOT / "pag_fast").rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert {str(file.relative_to(ROOT)) for file in files} <= held
    assert not [n for n in held if n.startswith(("kernels", "tests", "benchmarks", "comfyui"))]
    assert "License-Expression: Apache-2.0 AND OFL-1.1" in metadata
    assert f"Version: {pag_fast.__version__}\n" in metadata
    assert "Apache License" in licences[0]
    assert licences[1] == beside and "SIL OPEN FONT LICENSE" in beside
    assert "Copyright 2013-2017 Google Inc." in beside
    for text in ("Noto Color Emoji", "SIL Open Font License 1.1", "see `LICENSE`"):
        assert text in card
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", EMOJI + "LICENSE"} <= names


def test_metadata_that_an_index_would_refuse_is_noticed(tmp_path):
    broken = tmp_path / "x-1-py3-none-any.whl"
    for text in ("Metadata-Version: 2.4\nName: x\nVersion: one\n", "Name: x\n"):
        with zipfile.ZipFile(broken, "w") as wheel:
            wheel.writestr("x-1.dist-info/METADATA", text)
        with pytest.raises(ExceptionGroup):
            dist.check_metadata(broken)


def test_the_changelog_has_this_version():
    """A release turns the first heading into a version and a date; until then it is unreleased."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert len(headings) == text.count("\n## ") and headings[0] == ("Unreleased", "")
    released = [version for version, day in headings[1:] if day]
    assert len(released) == len(headings) - 1
    assert pag_fast.__version__ in (released[:1] or [re.search(r"will be (\S+),", text)[1]])
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_citation_without_a_number_that_goes_stale():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation and "2403.17377" in citation["references"][0]["notes"]
