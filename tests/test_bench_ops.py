"""The benchmark of the ops compares like with like."""

from __future__ import annotations

import pytest
import torch
from launches import launches  # noqa: F401

from benchmarks import bench_ops

TINY = [
    bench_ops.Layer("tiny self", "self", 16, 2, 16),
    bench_ops.Layer("tiny joint", "joint", 16, 2, 16, 5),
    bench_ops.Layer("tiny rotary", "rotary", 16, 2, 16),
    bench_ops.Layer("tiny linear", "linear", 16, 2, 16),
]


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.family)
@torch.no_grad()
def test_every_contender_computes_the_same(layer, launches):  # noqa: F811
    calls = bench_ops.processor_calls(layer, "cpu")
    assert list(calls) == ["stock", "stock compiled", "torch", "triton", "auto"]
    del calls["stock compiled"]
    results = {}
    for name, call in calls.items():
        out = call()
        results[name] = torch.cat(out, dim=1) if isinstance(out, tuple) else out
    for name in ("torch", "triton", "auto"):
        assert torch.allclose(results[name], results["stock"], atol=2e-3, rtol=1e-2), name
    for call in bench_ops.op_calls(layer, "cpu").values():
        assert torch.isfinite(call()).all()


def test_the_combination_computes_the_same(launches):  # noqa: F811
    by_torch, by_triton = (call() for call in bench_ops.combine_calls(0.7, "cpu").values())
    assert torch.allclose(by_torch, by_triton, atol=2e-2, rtol=1e-2)


def test_floors():
    """SDXL's mid layer: 20 heads of 64 channels on 1024 tokens, two rows of three attend."""
    layer = bench_ops.LAYERS[0]
    row = 2 * 1024 * 20 * 64
    assert bench_ops.floor(layer) == (row * (2 + 2 + 3 + 3), 4 * 2 * 1024 * 1024 * 20 * 64)
    assert bench_ops.combine_floor(100, rescale=False) == (800, 500)


def test_table_without_a_gpu_has_floors_only():
    rows = bench_ops.bench("cpu", progress=False)
    assert len(rows) == 2 * len(bench_ops.LAYERS) + 2
    assert all(row.floor_bytes > 0 and not row.seconds for row in rows)
    assert len(bench_ops.table(rows).splitlines()) == len(rows) + 2


def test_table_with_times():
    seconds = {"stock": 4e-6, "stock compiled": 3e-6, "torch": 2e-6, "triton": 1e-6, "auto": 1e-6}
    row = bench_ops.Row("model", "layer", 1_000_000, 1_000_000_000, seconds)
    line = bench_ops.table([row]).splitlines()[-1]
    assert "| 4 | 3 | 2 | 1 | 1 |" in line
    assert "1000 TFLOP/s, 1000 GB/s" in line
    assert "3.00 ×" in line
