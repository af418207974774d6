"""Faults planted on purpose, and the tests that see them: ``python tests/faults.py [NAME …]``.

Each is planted alone in a temporary copy of the tree, its tests are run there, and the copy is
restored. A fault that no test sees has survived, and the exit status is 1. ``--list`` names them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from faults_of_calls import CALLS
from faults_of_kept import KEPT
from faults_of_numbers import NUMBERS
from faults_of_ops import OPS
from faults_of_others import OTHERS
from faults_of_own_code import OWN_CODE
from faults_of_ranks import RANKS
from faults_of_rows import ROWS
from faults_of_seen import SEEN
from faults_of_stock import STOCK
from planting import Fault

ROOT = Path(__file__).parent.parent
_IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "demo", "bench-results")


FAULTS = [*NUMBERS, *OPS, *CALLS, *KEPT, *SEEN, *ROWS, *STOCK, *OTHERS, *OWN_CODE, *RANKS]


def anchors() -> list[str]:
    """What is wrong with the anchors: a sentence for each that is not found exactly once."""
    wrong = []
    for fault in FAULTS:
        try:
            fault.planted((ROOT / fault.path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    return wrong


def _run(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (tree, tree / "tests", tree / "kernels" / "torch-ext")))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rf", *tests]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def _write(target: Path, text: str) -> None:
    """Write a source and drop its bytecode.

    Python takes bytecode for a source's by length and whole seconds, so a text as long, written
    in the same second, would run as the one before it: the fault seen would be another.
    """
    target.write_text(text, encoding="utf-8")
    for bytecode in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
        bytecode.unlink()


def check(fault: Fault, tree: Path) -> tuple[bool, str]:
    """Whether a test sees ``fault`` in a copy of the tree, and what pytest said."""
    target = tree / fault.path
    before = target.read_text("utf-8")
    _write(target, fault.planted(before))
    try:
        done = _run(tree, fault.tests)
    finally:
        _write(target, before)
    lines = done.stdout.splitlines()
    seen = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    # 1: a test failed; anything else (no test, an import error) shows nothing about the fault
    said = seen[0] if seen else (lines or [done.stderr.strip()])[-1]
    return done.returncode == 1 and bool(seen), said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a fault's name")
    parser.add_argument("--list", action="store_true", help="name the faults")
    arguments = parser.parse_args(argv)
    wrong = anchors()
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    wanted = arguments.names or [""]
    chosen = [fault for fault in FAULTS if any(part in fault.name for part in wanted)]
    if not chosen:
        print(f"No fault is called {', '.join(wanted)}: --list names them.", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{fault.name}: {fault.path}" for fault in chosen))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=_IGNORED)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            done = _run(tree, tests)
            if done.returncode:
                print(f"{' '.join(tests)} fails without a fault:\n{done.stdout}", file=sys.stderr)
                return 2
        for fault in chosen:
            caught, said = check(fault, tree)
            survivors += [] if caught else [fault.name]
            print(f"{'seen' if caught else 'SURVIVED'}: {fault.name}: {said}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
