"""Counting FLOPs with results of meta ops that are remembered: the same integers, sooner."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shallow_cards import shallow_card
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from pag_fast.analysis import counter
from pag_fast.analysis.counter import FlopCounter, run_op
from pag_fast.analysis.published import meta_model


@pytest.mark.parametrize("name", ["AnimateDiffPAG", "HunyuanDiTPAG", "SanaPAG", "LTX"])
def test_counts_are_pytorchs(name):
    """Of a whole model and of each module; blocks are alike, and remembered."""
    card = shallow_card(f"{name}Pipeline")
    model = meta_model(card)
    call = card.size.inputs(model)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(**call(2), return_dict=False)
    counted = {name: sum(x.values()) for name, x in theirs.get_flop_counts().items()}
    for rows in (1, 2):
        with torch.no_grad(), ModuleTracker() as tracker, FlopCounter(tracker) as ours:
            out = model(**call(rows), return_dict=False)[0]
    assert ours.total == theirs.get_total_flops() > 0
    assert ours.modules == counted
    assert out.shape[0] == 2


def _new(*shape, dtype=torch.float32, device="meta"):
    return torch.empty(*shape, dtype=dtype, device=device)


def _described(out):
    results = out if isinstance(out, tuple) else (out,)
    return type(out), [(x.shape, x.stride(), x.dtype, x.device) for x in results]


_CALLS = [
    lambda: torch.mul(_new(2, 3), _new(3)),
    lambda: torch.mul(_new(2, 3), _new(2, 3)),
    lambda: torch.mul(_new(2, 3), _new(3, dtype=torch.float64)),
    lambda: torch.mul(_new(3, 2).t(), _new(3, 2).t()),  # strides are kept
    lambda: torch.mul(_new(2, 3, dtype=torch.int64), 2),
    lambda: torch.mul(_new(2, 3, dtype=torch.int64), 2.0),  # 2 and 2.0 are equal
    lambda: torch.cat([_new(2, 3), _new(1, 3)]),
    lambda: torch.cat([_new(2, 3), _new(2, 3)], dim=1),
    lambda: F.layer_norm(_new(2, 3), (3,)),
    lambda: torch.native_layer_norm(_new(2, 3), (3,), None, None, 1e-5),
    lambda: _new(2, 3).to(torch.float16),
    lambda: torch.mul(_new(2, 3, device="cpu"), 2),
    lambda: torch.nn.Parameter(_new(2, 3)) + 1,
]


def test_results_are_pytorchs(monkeypatch):
    monkeypatch.setattr(counter, "_known", {})
    with torch.no_grad():
        wanted = [_described(call()) for call in _CALLS]
        with FlopCounter():
            for _ in range(2):
                assert [_described(call()) for call in _CALLS] == wanted
    assert counter._known, "nothing was remembered"


def test_the_default_dtype_is_part_of_what_is_asked():
    found = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            with torch.no_grad(), FlopCounter():
                found.append((_new(2, dtype=torch.int64) / 3).dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == [torch.float32, torch.float64, torch.float32]


def test_views_and_writes_are_made_each_time():
    x = _new(2, 3)
    with torch.no_grad(), FlopCounter():
        for _ in range(2):
            assert x.t()._base is x
            assert x.add_(1) is x


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(counter, "_known", {})
    monkeypatch.setattr(counter, "_MOST", 2)
    for size in range(1, 9):
        run_op(torch.ops.aten.neg.default, (_new(size),), {})
        assert len(counter._known) <= 2
