"""What the package ships, and what importing it must not do."""

from __future__ import annotations

import ast
import importlib.metadata
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools

import pag_fast

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_wheel_holds_the_shipped_model(tmp_path):
    """``pag-fast demo`` has to find it after a plain ``pip install .``, without the checkout."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    wheels.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "pag_fast", source / "pag_fast", ignore=ignore)
    if (ROOT / "kernels").exists():
        shutil.copytree(ROOT / "kernels", source / "kernels", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    files = [f for f in (ROOT / "pag_fast").rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert {str(file.relative_to(ROOT)) for file in files} <= held
