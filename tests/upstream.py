"""Diffusers' own tests with its PAG pipelines patched: ``python tests/upstream.py CHECKOUT``.

They run twice in a checkout of diffusers, stock and patched, and every output of a PAG pipeline is
compared: none may move by more than rounding, and no test may fail that passes with stock. What a
test needs from the hub it has to find there, or it fails in both runs and shows nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODE, FILE = "PAG_FAST_UPSTREAM_MODE", "PAG_FAST_UPSTREAM_FILE"
TESTS = ("tests/pipelines/pag",)
TOLERANCE = 1e-4  # relative; half precision is seen in the list, and judged by who reads it


# ---- the plugin: what a run of pytest records ----


class Recorder:
    """Outcomes of tests, and what their PAG pipelines have returned, in order."""

    def __init__(self, patched: bool, file: Path) -> None:
        self.patched, self.file = patched, file
        self.outcomes: dict[str, str] = {}
        self.outputs: dict[str, list[list[Any]]] = {}
        self.now = ""

    def wrap(self, cls: Any) -> None:
        """Have pipelines of ``cls`` recorded and, if asked, patched as they are made."""
        init, call = cls.__init__, cls.__call__

        @functools.wraps(init)
        def __init__(pipe: Any, *args: Any, **kwargs: Any) -> None:
            init(pipe, *args, **kwargs)
            if self.patched and type(pipe) is cls:
                import pag_fast

                pag_fast.patch(pipe)

        @functools.wraps(call)
        def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            out = call(pipe, *args, **kwargs)
            self.outputs.setdefault(self.now, []).append(arrays(out))
            return out

        cls.__init__, cls.__call__ = __init__, __call__

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.file.write_bytes(pickle.dumps((self.outcomes, self.outputs)))


def pytest_configure(config: Any) -> None:
    mode = os.environ.get(MODE)
    if mode:
        import diffusers

        from pag_fast.pipelines.registry import PAG_PIPELINES

        recorder = Recorder(mode == "patched", Path(os.environ[FILE]))
        for name in PAG_PIPELINES:
            cls = getattr(diffusers, name, None)
            # what cannot be imported is a stand-in that says so
            if cls is not None and cls.__module__.startswith("diffusers.pipelines."):
                recorder.wrap(cls)
        config.pluginmanager.register(recorder)


def arrays(value: Any) -> list[Any]:
    """Everything in an output of a pipeline that has numbers."""
    if hasattr(value, "detach"):
        return [value.detach().float().cpu().numpy()]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for item in value for x in arrays(item)]
    if isinstance(value, np.ndarray) or hasattr(value, "getpixel"):
        return [np.asarray(value, dtype=np.float32)]
    return []


# ---- the script: two runs, compared ----


def run(checkout: Path, tests: Sequence[str], mode: str) -> tuple[dict[str, str], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recorded"
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            MODE: mode,
            FILE: str(file),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "upstream", *tests]
        subprocess.run(command, cwd=checkout, env=environment)
        found: tuple[dict[str, str], dict[str, Any]] = pickle.loads(file.read_bytes())
        return found


def difference(stock: Sequence[Any], ours: Sequence[Any]) -> float:
    """The largest relative difference between two outputs; infinite where their shapes differ."""
    if [x.shape for x in stock] != [x.shape for x in ours]:
        return float("inf")
    found = [0.0]
    for a, b in zip(stock, ours, strict=True):
        size, distance = np.linalg.norm(a), np.linalg.norm(a - b)
        found.append(distance / size if size else distance)
    # not Python's, for which a NaN may be the smaller one
    return float(np.max(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/upstream.py", description=__doc__)
    parser.add_argument("checkout", type=Path, help="of diffusers, with its tests")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files and folders, from there")
    arguments = parser.parse_args(argv)
    outcomes, outputs = run(arguments.checkout, arguments.tests, "stock")
    ours, moved = run(arguments.checkout, arguments.tests, "patched")
    passed = [name for name, outcome in outcomes.items() if outcome == "passed"]
    worse = [name for name in passed if ours.get(name) != "passed"]
    distances = {}
    for name, calls in outputs.items():
        found = moved.get(name, [])
        if len(calls) == len(found):
            distances[name] = float(np.max([*map(difference, calls, found)]))
        elif name in passed:  # elsewhere a test may have ended early
            distances[name] = float("inf")
    far = {name: x for name, x in distances.items() if not x <= TOLERANCE}
    print(f"stock: {dict(Counter(outcomes.values()))}, patched: {dict(Counter(ours.values()))}")
    print(f"{sum(map(len, outputs.values()))} outputs of {len(distances)} tests compared, ", end="")
    print(f"the largest relative difference is {np.max([0.0, *distances.values()]):.1e}")
    for name in worse:
        print(f"passes with stock, not patched: {name}")
    for name, distance in far.items():
        print(f"has moved by {distance:.1e}: {name}")
    return 1 if worse or far or not distances else 0


if __name__ == "__main__":
    sys.exit(main())
