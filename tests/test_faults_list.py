"""The planted faults: every one has a place in today's code, and the script sees a survivor."""

from __future__ import annotations

import os
import subprocess
import sys

import faults
import pytest
from faults import FAULTS, ROOT, Fault


def test_every_anchor_is_found_once():
    assert faults.anchors() == []


def test_names_and_tests_exist():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert (ROOT / fault.tests[0]).exists(), fault.name
        assert fault.old != fault.new


def test_reformatting_does_not_matter():
    fault = Fault("a", "x.py", "f(a, b) + 1", "f(b, a)", ())
    assert fault.planted("y = f(\n    a,\n    b,\n) + 1\n") == "y = f(b, a)\n"
    for text in ("", "f(a, b) + 1; f(a, b) + 1", "f(a, c) + 1"):
        with pytest.raises(ValueError, match="times, not once"):
            fault.planted(text)


def test_a_survivor_is_told(tmp_path):
    tests = ("tests/test_x.py",)
    (tmp_path / "tests").mkdir()
    (tmp_path / "x.py").write_text("ONE = 1\nTWO = 2\n")
    (tmp_path / "tests" / "test_x.py").write_text("import x\n\ndef test():\n    assert x.ONE == 1")
    assert faults.check(Fault("seen", "x.py", "ONE = 1", "ONE = 3", tests), tmp_path)[0]
    assert not faults.check(Fault("survives", "x.py", "TWO = 2", "TWO = 3", tests), tmp_path)[0]
    assert not faults.check(Fault("none", "x.py", "ONE = 1", "ONE = (", tests), tmp_path)[0]
    assert (tmp_path / "x.py").read_text() == "ONE = 1\nTWO = 2\n"


def test_bytecode_of_another_fault_is_not_run(tmp_path):
    target = tmp_path / "x.py"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for number in (1, 2):
        faults._write(target, f"ONE = {number}\n")
        os.utime(target, (0, 0))  # Python takes bytecode by a source's length and its second
        asked = [sys.executable, "-c", "import x; print(x.ONE)"]
        done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == f"{number}\n", done.stderr
        assert list(tmp_path.glob("__pycache__/x.*.pyc"))
