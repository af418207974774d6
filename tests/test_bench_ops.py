"""The benchmark of the ops compares like with like."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401

from benchmarks import bench_ops
from pag_fast.tools.bench.timing import make_rows

TINY = [
    bench_ops.Layer("tiny self", "self", 16, 2, 16),
    bench_ops.Layer("tiny joint", "joint", 16, 2, 16, 5),
    bench_ops.Layer("tiny rotary", "rotary", 16, 2, 16),
    bench_ops.Layer("tiny linear", "linear", 16, 2, 16),
]
HALF, OURS = torch.float16, list(bench_ops.BACKENDS)


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.family)
@torch.no_grad()
def test_every_contender_computes_the_same(layer, launches):  # noqa: F811
    calls = bench_ops.layer_calls(layer, "cpu", HALF, OURS)
    assert list(calls) == ["stock", "stock compiled", *OURS]
    del calls["stock compiled"]
    results = {}
    for name, call in calls.items():
        out = call()
        results[name] = torch.cat(out, dim=1) if isinstance(out, tuple) else out
    for name in OURS:
        assert torch.allclose(results[name], results["stock"], atol=2e-3, rtol=1e-2), name


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.family)
def test_the_op_is_checked_against_its_reference(layer, launches):  # noqa: F811
    calls, expected = bench_ops.op_calls(layer, "cpu", HALF, OURS)
    assert list(calls) == (["SDPA"] if layer.family != "linear" else []) + OURS
    for name in OURS:
        assert torch.allclose(calls[name]().float(), expected, atol=2e-3, rtol=1e-2), name
    if "SDPA" in calls and not layer.context:
        attending = calls["SDPA"]().transpose(1, 2).float()
        assert torch.allclose(attending, expected[:2], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_combination_computes_the_same(rescale, launches, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bench_ops, "LATENTS", (2, 4, 32, 33))
    calls, expected = bench_ops.combine_calls(rescale, "cpu", HALF, OURS)
    assert list(calls) == ["stock", "stock compiled", *OURS]
    bench_ops.check(calls, expected, skip=["stock compiled"])


@torch.no_grad()
def test_a_wrong_result_is_not_timed():
    calls, expected = bench_ops.op_calls(TINY[0], "cpu", torch.float32, ["patched"])
    bench_ops.check(calls, expected, skip=["SDPA"])
    with pytest.raises(AssertionError, match=r"SDPA is .* from what it must return"):
        bench_ops.check({"SDPA": lambda: expected + 0.01}, expected)


def test_floors():
    """SDXL's mid layer: 20 heads of 64 channels on 1024 tokens, two rows of three attend."""
    layer = bench_ops.LAYERS[0]
    row = 2 * 1024 * 20 * 64
    assert bench_ops.floor(layer) == (row * (2 + 2 + 3 + 3), 4 * 2 * 1024 * 1024 * 20 * 64)
    assert bench_ops.floor(layer, 4)[0] == 2 * bench_ops.floor(layer)[0]
    assert bench_ops.combine_floor(100, rescale=False) == (800, 500)
    for layer in bench_ops.LAYERS:
        small = bench_ops.for_device(layer, "cpu")
        assert bench_ops.for_device(layer, "cuda") is layer
        assert 0 < bench_ops.floor(small)[1] < bench_ops.floor(layer)[1]


def _rows(case, seconds):
    settings = {"floor_bytes": 1_000_000, "floor_flops": 1_000_000_000}
    samples = {name: [value] for name, value in seconds.items()}
    return make_rows(samples, suite="op", case=case, settings=settings, dtype="float16")


def test_table():
    seconds = {
        "SDPA": 9e-6,
        "stock": 4e-6,
        "stock compiled": 3e-6,
        "patched": 1e-6,
        "patched torch": 2e-6,
        "patched triton": 1e-6,
    }
    lines = bench_ops.table(_rows("a layer", seconds)).splitlines()
    assert len(lines) == 3
    assert "| a layer | 1.0 | 1.00 | 9 | 4 | 3 | 1 | 2 | 1 |" in lines[-1]
    assert "1000.00 TFLOP/s, 1000.0 GB/s" in lines[-1]
    # against the fastest baseline
    assert "3.00 ×" in lines[-1]


def test_table_of_a_cpu():
    """One line a case, whatever was measured there; one number a column."""
    rows = _rows("a", {"SDPA": 2e-6, "patched": 2e-6}) + _rows("b", {"patched": 2e-6})
    header, rule, first, second = bench_ops.table(rows).splitlines()
    assert {line.count("|") for line in (header, first, second)} == {rule.count("|")}
    assert "1.00 ×" in first
    assert "×" not in second
