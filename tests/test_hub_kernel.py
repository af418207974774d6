"""The folder ``kernels`` as a Hugging Face kernel project, loaded by the package ``kernels``."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from launches import launches  # noqa: F401

from pag_fast.ops import reference

ROOT = Path(__file__).parent.parent
PROJECT = ROOT / "kernels"
SOURCE = PROJECT / "torch-ext" / "pag_fast_kernels"


def _installed() -> bool:
    # not find_spec: our own folder would be found
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_kernels = pytest.mark.skipif(not _installed(), reason="the package kernels is not installed")


@needs_kernels
def test_build_file_is_valid():
    from kernels._rust import Build

    assert [str(backend) for backend in Build.open(PROJECT).general.backends] == ["cuda", "rocm"]
    project = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))["general"]
    assert project["name"].replace("-", "_") == SOURCE.name


@pytest.fixture
def built(tmp_path):
    """What the builder makes of a project without compiled code: a copy, and metadata."""
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": "pag_fast_kernels_test",
        "name": "pag-fast-kernels",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("pag_fast_kernels_test")]:
        del sys.modules[name]


@needs_kernels
def test_loads_and_computes(built, launches):  # noqa: F811
    from kernels import get_local_kernel

    kernel = get_local_kernel(built, backend="cpu")
    assert Path(kernel.__file__).is_relative_to(built)
    q, k, v = torch.randn(3, 3, 40, 2, 32).unbind()
    out = kernel.perturbed_attention(q, k, v, torch.empty_like(v), num_attend=2, scale=32**-0.5)
    expected = reference.perturbed_attention(q[:2], k[:2], v, num_attend=2)
    assert torch.allclose(out, expected, atol=1e-5)


def test_imports_stay_inside():
    """The builder's rule: the standard library, torch, triton, and relative imports."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def test_nothing_the_builder_generates_is_committed():
    assert not (SOURCE / "_ops.py").exists()
    assert not (PROJECT / "pyproject.toml").exists()
    assert not (PROJECT / "setup.py").exists()
