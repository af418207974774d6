"""Tuning, with a clock of our own on the CPU: what it chooses, and that the table is read back."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401
from pag_fast_kernels.launch import Config, Measured, call_key, nearest_table, read_table

from benchmarks import tune

SLOW, FAST = Config(16, 16, 4, 1), Config(32, 32, 4, 1)
CASE = tune.Case("tiny", 40, 2, 16)


@pytest.mark.parametrize(("torch_seconds", "expected"), [(0.5, "torch"), (2.0, "triton")])
def test_the_fastest_wins(torch_seconds, expected, launches):  # noqa: F811
    clock = iter([torch_seconds, 3.0, 1.0])

    def measure(run):
        run()
        return next(clock)

    entry = tune.tune_case(CASE, torch.float32, "cpu", [SLOW, FAST], measure)
    assert (entry["backend"], entry["config"]) == (expected, [32, 32, 4, 1])
    assert entry["microseconds"] == {"torch": torch_seconds * 1e6, "triton": 1e6}


@pytest.mark.parametrize("mix", tune.MIXES, ids=str)
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
    real = tune.perturbed_attention

    def broken(q, k, v, out, *, config, **rest):
        result = real(q, k, v, out, config=config, **rest)
        return result.mul_(2) if config == FAST else result

    monkeypatch.setattr(tune, "perturbed_attention", broken)
    entry = tune.tune_case(
        CASE, torch.float32, "cpu", [SLOW, FAST], lambda run: 1.0 + (run() is None)
    )
    assert entry["config"] == [16, 16, 4, 1]


def test_stops_in_time(launches):  # noqa: F811
    assert list(tune.tune([CASE], [torch.float32], "cpu", [SLOW], lambda run: 1.0, until=0)) == []
    launches.append("none wanted")


def test_every_case_is_a_call_the_op_takes():
    for case in tune.all_cases():
        assert case.attend <= case.rows
        assert case.context < case.tokens
