"""Every stage of the GPU suite on a machine without a GPU, on a fake one: ``make rehearse``.

The rehearsal is ``benchmarks/gpu_suite.sh`` itself, in a read-only copy of the checkout that has no
``.git``, on the fake of this folder at tiny sizes. ``REHEARSAL_SITE``, if set, is a folder of
packages that come before the environment's, such as another triton. pytest does not come here by
itself: it takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from rehearsal import fake_cuda

from benchmarks.gpu_suite import tree_id
from benchmarks.stages import STAGES
from pag_fast.tools.bench.record import read

ROOT = Path(__file__).parent.parent.parent
COPIED = ("pag_fast", "benchmarks", "kernels", "tests", "pyproject.toml")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAKE = ("fake_cuda.py", "quick.py", "sitecustomize.py", "tiny_sizes.py")


@pytest.fixture
def suite(tmp_path):
    """A function that runs stages in a copy of the checkout: exit status, output, folder."""
    checkout = tmp_path / "checkout"
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        source, target = ROOT / name, checkout / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    before = _files(checkout)
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)

    def run(stages, pythonpath, **more):
        site = os.environ.get("REHEARSAL_SITE")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))},
            "OUT": str(tmp_path / "out"),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, [site, *map(str, pythonpath)])),
            "SCRATCH": str(tmp_path / "scratch"),
            "STAGE": stages,
            "COMMIT": COMMIT,
            "OMP_NUM_THREADS": "1",
            **more,
        }
        script = str(checkout / "benchmarks" / "gpu_suite.sh")
        # not from the checkout: nothing may depend on where it is started
        done = subprocess.run(
            [script], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert _files(checkout) == before, "the run has written into the checkout"
        return done.returncode, done.stdout + done.stderr, tmp_path / "out"

    yield run
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def _files(folder):
    """Content of a checkout; who may write everywhere, such as root, leaves bytecode."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {path: path.stat().st_mtime_ns for path in paths}


def _wheel(folder):
    """The fake as a package to carry along."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "fake_gpu-1.0-py3-none-any.whl", "w") as wheel:
        for name in FAKE:
            wheel.write(ROOT / "tests" / "rehearsal" / name, name)
        meta = "fake_gpu-1.0.dist-info"
        wheel.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: fake-gpu\nVersion: 1.0\n")
        wheel.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{meta}/RECORD", "")
    return str(folder)


# ---- rehearsals ----

# stages, and whether the fake comes by a folder of wheels instead of PYTHONPATH
# two run at a time, and those that take longest do not come to the same worker
REHEARSALS = [("compiled graphs", False), ("check", False), ("step", False), ("tune ops", True)]


@pytest.mark.parametrize(("stages", "carried"), REHEARSALS, ids=lambda value: str(value))
def test_rehearsal(stages, carried, suite, tmp_path):
    more = {"WHEELS": _wheel(tmp_path / "wheels")} if carried else {}
    more |= {"PYTEST_PLUGINS": "quick", "JOBS": "1"}
    path = [] if carried else [ROOT / "tests" / "rehearsal"]
    code, output, out = suite(stages, path, **more)
    reports = {name: json.loads((out / f"{name}.json").read_text()) for name in stages.split()}
    tails = [entry.get("tail") for report in reports.values() for entry in report["parts"]]
    assert code == 0, f"{output}\n{tails}"
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted([*(f"{n}.json" for n in reports), f"{'-'.join(reports)}.tar.gz"])
    for name, report in reports.items():
        _check(name, report)
        read(out / f"{name}.json")
    with tarfile.open(out / f"{'-'.join(reports)}.tar.gz") as tar:
        logs = [name for name in tar.getnames() if name.endswith(".log")]
    ran = [e for report in reports.values() for e in report["parts"] if e["status"] == "passed"]
    assert len(logs) == len(ran)
    CHECKS.get(stages, lambda reports: None)(reports)


def _check(name, report):
    machine = report["machine"]
    assert machine["chip"] == fake_cuda.NAME
    assert machine["commit"] == COMMIT
    assert machine["torch"] == torch.__version__
    assert report["sources"]["pag_fast"] == tree_id(ROOT / "pag_fast")
    assert [entry["name"] for entry in report["parts"]] == [part.name for part in STAGES[name]]
    assert {entry["status"] for entry in report["parts"]} == {"passed"}
    assert report["tests"] == "passed"


def _check_step(reports):
    """The fastest baselines and ours are of one run, with the memory they took."""
    rows = reports["step"]["rows"]
    first = [row for row in rows if (row["suite"], row["case"]) == ("step", "SDXL 1024")]
    names = ["no PAG", "stock", "patched", "patched graphs"]
    variants = [row["variant"] for row in first]
    assert variants[: len(names)] == names
    assert variants[len(names) :] == [*names[:3], "stock compiled", *names[3:]]
    for ours in (row for row in first[len(names) :] if row["variant"].startswith("patched")):
        assert {"stock", "stock compiled", "no PAG"} <= ours["ratios"].keys()
    assert all(row["peak_bytes"] for row in rows)
    cases = {row["case"] for row in rows if row["suite"] == "step"}
    assert len(cases) == 9
    assert {row["case"] for row in rows if row["suite"] == "pipeline"} == {
        "SDXL 1024",
        "emoji batch 8",
    }


def _check_tune(reports):
    ((chip, table),) = reports["tune"]["table"].items()
    assert chip == "nvidia-rehearsal"
    assert len(table["attention"]) > 3
    cases = {row["case"].rpartition(": ")[2] for row in reports["ops"]["rows"]}
    assert cases == {"op", "layer", "combine", "combine rescale"}


CHECKS = {"step": _check_step, "tune ops": _check_tune}


def test_without_a_gpu(suite):
    """A sentence, at once, and still a file."""
    code, output, out = suite("step", [])
    assert code == 1
    assert "Missing here: a GPU that torch can use." in output
    report = json.loads((out / "step.json").read_text())
    assert {entry["status"] for entry in report["parts"]} == {"not started"}
    assert report["tests"] == "not run"
