"""Tuning, with a clock of our own on the CPU: what it chooses, and that the table is read back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from launches import launches  # noqa: F401
from pag_fast_kernels.launch import Config, Measured, call_key, nearest_table, read_table

from benchmarks import tiles, tune

ROOT = Path(__file__).parent.parent
SLOW, FAST = Config(16, 16, 4, 1), Config(32, 32, 4, 1)
CASE = tune.Case("tiny", 40, 2, 16)


@pytest.mark.parametrize(("torch_seconds", "expected"), [(0.5, "torch"), (2.0, "triton")])
def test_the_fastest_wins(torch_seconds, expected, launches):  # noqa: F811
    clock = iter([torch_seconds, 3.0, 1.0])

    def measure(run):
        run()
        return next(clock)

    entry = tune.tune_case(CASE, torch.float32, "cpu", [SLOW, FAST], measure)
    assert entry["backend"] == expected and Config(*entry["config"]) == FAST
    assert entry["microseconds"] == {"torch": torch_seconds * 1e6, "triton": 1e6}


@pytest.mark.parametrize("mix", tiles.MIXES, ids=str)
@pytest.mark.parametrize("context", [0, 7])
def test_table_is_read_back(mix, context, launches, tmp_path):  # noqa: F811
    case = tune.Case("tiny", 40, 2, 16, context, *mix)
    *_, entries = tune.tune([case], [torch.float32], "cpu", [SLOW], lambda run: run() is not None)
    path = tmp_path / "chip.json"
    tune.write_table(path, entries, "a chip", ("sm_90", 132))
    key = call_key(torch.float32, 16, 40, *mix, context)
    assert read_table(path) == {key: Measured("torch", SLOW)}


def test_chips_without_a_table_take_the_nearest(tmp_path):
    """Of their own architecture: others run other binaries."""
    chips = {"h200": ("sm_90", 132), "half": ("sm_90", 66), "b200": ("sm_100", 148)}
    for name, chip in chips.items():
        tune.write_table(tmp_path / f"{name}.json", [], name, chip)
    (tmp_path / "old.json").write_text('{"attention": []}')
    assert nearest_table(tmp_path, "sm_90", 114).stem == "h200"
    assert nearest_table(tmp_path, "sm_90", 78).stem == "half"
    assert nearest_table(tmp_path, "sm_100", 20).stem == "b200"
    assert nearest_table(tmp_path, "sm_103", 148) is None


def test_wrong_results_are_no_candidates(launches, monkeypatch):  # noqa: F811
    real = tune.launch

    def broken(case, config, *tensors):
        result = real(case, config, *tensors)
        return result.mul_(2) if config == FAST else result

    monkeypatch.setattr(tune, "launch", broken)
    entry = tune.tune_case(
        CASE, torch.float32, "cpu", [SLOW, FAST], lambda run: 1.0 + (run() is None)
    )
    assert Config(*entry["config"]) == SLOW


def test_stops_in_time(launches):  # noqa: F811
    assert list(tune.tune([CASE], [torch.float32], "cpu", [SLOW], lambda run: 1.0, until=0)) == []
    launches.append("none wanted")


def test_every_case_is_a_call_the_op_takes():
    for case in tune.all_cases():
        assert case.attend <= case.rows
        assert case.context < case.tokens


DRIVER = """
import sys
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

stub = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)
driver.set_active(stub)
from benchmarks import tiles
tiles.compile_only()
for block in map(int, sys.argv[1:]):
    tiles.compile_case(
        tiles.Case("tiny", 40, 2, 16, 7), torch.float16, tiles.Config(block, 16, 4, 2), "cpu"
    )
"""


def test_compiled_ahead_and_not_launched(tmp_path):
    """For sm_90, by a driver that can launch nothing: the binaries are in the cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    subprocess.run([sys.executable, "-c", DRIVER, "16", "32"], env=environment, check=True)
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_cases_wait_for_their_kernels():
    """What is measured has been compiled; behind the deadline nobody waits."""
    key = (CASE, torch.float32)
    ahead = tiles.Ahead([CASE], [torch.float32], [SLOW, FAST], 1, time.monotonic() + 300, "cpu")
    try:
        ahead.ready(*key)
        assert [job.exception(0) for job in ahead._jobs[key]] == [None, None]
        ahead._until = time.monotonic() - 1
        ahead._jobs[key] = [futures.Future()]
        ahead.ready(*key)  # for ever, if it waited
    finally:
        ahead.stop()


def test_specialised_tiles_are_measured_where_they_run(launches, monkeypatch):  # noqa: F811
    """Elsewhere a launch with such a tile would be one with the default tile."""
    special = Config(32, 32, 4, 1, specialised=True)
    seen, real = [], tune.launch
    monkeypatch.setattr(
        tune, "launch", lambda case, config, *x: seen.append(config) or real(case, config, *x)
    )
    cases = {
        tune.Case("tiny", 64, 2, 64): [SLOW, special],
        tune.Case("tiny", 40, 2, 64): [SLOW],
        tune.Case("tiny", 64, 2, 64, 7): [SLOW],
    }
    for case, expected in cases.items():
        tune.tune_case(case, torch.float16, "cpu", [SLOW, special], lambda run: 1.0)
        assert seen == expected
        seen.clear()
