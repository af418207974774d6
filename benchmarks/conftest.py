"""What the benchmarks share: ``python -m pytest benchmarks --rows OUT.json``.

Inside one test of pytest-benchmark all variants of a case take turns: in each round the baselines
are timed before and after the patched variant, as set-up and tear-down. So pytest-benchmark's
statistics are those of the patched variant, and the ratios that :mod:`benchmarks.compare` looks at
are of the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pag_fast.tools.bench.record import Results, Row, machine, write
from pag_fast.tools.bench.report import table
from pag_fast.tools.bench.timing import Call, Clock, make_rows, peak_bytes, seconds, turns
from pag_fast.tools.bench.variants import STOCK

ROWS = pytest.StashKey[list[Row]]()
START = time.monotonic()
diffusers.logging.set_verbosity_error()
# fp32 means fp32, for stock and for us: TF32 in cuDNN's convolutions alone moves results by 1e-3
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pag_fast")
    group.addoption("--rows", type=Path, metavar="PATH", help="write the results to this file")
    group.addoption("--rounds", type=int, help="rounds of every case, instead of its own number")
    group.addoption("--steps", type=int, help="steps of a call, instead of each case's own number")
    group.addoption(
        "--compiled",
        choices=("auto", "yes", "no", "stock"),
        default="auto",
        help="measure under torch.compile too; stock: that alone; auto: on a GPU",
    )
    group.addoption(
        "--graphs",
        choices=("auto", "yes", "no"),
        default="auto",
        help="measure CUDA graphs too; auto: on a GPU",
    )
    group.addoption(
        "--seconds", type=float, default=float("inf"), help="start no further case after that"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - START > item.config.getoption("--seconds"):
        pytest.skip("--seconds are over")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    passed = exitstatus == pytest.ExitCode.OK and session.config.stash[ROWS]
    empty = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    _write(session.config, "passed" if passed else "not run" if empty else "failed")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    from benchmarks.bench_ops import table as op_table

    terminalreporter.section("pag_fast")
    others = [row for row in rows if row.suite != "op"]
    if others:
        terminalreporter.write_line("\n".join([*table(others), ""]))
    if len(others) < len(rows):
        terminalreporter.write_line(op_table([row for row in rows if row.suite == "op"]))


def _write(config: pytest.Config, tests: str) -> None:
    path = config.getoption("--rows")
    if path is not None:
        write(Results(machine(_device()), config.stash[ROWS], tests), path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    return _device()


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config, device: str) -> bool | tuple[str, ...]:
    wish = pytestconfig.getoption("--compiled")
    return (STOCK,) if wish == "stock" else wish == "yes" or (wish == "auto" and device == "cuda")


@pytest.fixture(scope="session")
def graphs(pytestconfig: pytest.Config, device: str) -> bool:
    wish = pytestconfig.getoption("--graphs")
    return wish == "yes" or (wish == "auto" and device == "cuda")


@pytest.fixture
def compare(
    benchmark: Any, pytestconfig: pytest.Config, device: str
) -> Callable[..., dict[str, Row]]:
    """A function that measures all variants of one case, and returns their rows by variant."""

    def run(
        calls: Mapping[str, Call],
        *,
        suite: str,
        case: str,
        settings: dict[str, Any],
        dtype: str,
        rounds: int,
        psnrs: Mapping[str, float] | None = None,
        clock: Clock = seconds,
        per_call: int = 1,
        warm: bool = False,
    ) -> dict[str, Row]:
        """``calls["patched"]`` is ours; a call does ``per_call`` of what the rows count.

        ``warm`` says that all of them have run already.
        """
        rounds = pytestconfig.getoption("--rounds") or rounds
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order, waiting = turns(list(calls)), []

        def take(name: str) -> None:
            samples[name].append(clock(calls[name], device) / per_call)

        def before() -> None:
            waiting[:] = next(order)
            while waiting[0] != "patched":
                take(waiting.pop(0))

        def after() -> None:
            while len(waiting) > 1:
                take(waiting.pop(1))

        if not warm:
            for call in calls.values():
                call()
        benchmark.pedantic(lambda: take("patched"), setup=before, teardown=after, rounds=rounds)
        after()  # with --benchmark-disable there is no tear-down
        peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
        rows = make_rows(
            samples,
            suite=suite,
            case=case,
            settings=settings,
            dtype=dtype,
            peaks=peaks,
            psnrs=psnrs,
        )
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        pytestconfig.stash[ROWS] += rows
        # a session that is cut short leaves what it has, which no comparison takes
        _write(pytestconfig, "not run")
        return {row.variant: row for row in rows}

    return run
