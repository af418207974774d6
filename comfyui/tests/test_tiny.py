"""The tiny models are what the other tests take them for, without any node of ours."""

from __future__ import annotations

import pytest
import tiny
import torch
from flops import Flops
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_part_of_a_conditioning_and_every_row_matters(name: str) -> None:
    model = tiny.build(name)
    one = tiny.sample(model, steps=2)
    assert one.shape == model.shape
    assert one.isfinite().all()
    assert torch.equal(one, tiny.sample(model, steps=2))
    other = tiny.sample(model, positive=model.cond(3), steps=2)
    assert (other - one).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("name", tiny.UNETS)
def test_cores_pag_computes_half_a_step_more(name: str) -> None:
    model = tiny.build(name)
    with Flops() as plain:
        without = tiny.sample(model, steps=2)
    with Flops() as stock:
        guided = tiny.sample(model, tiny.stock(model.model), steps=2)
    assert 1.49 < stock / plain <= 1.5
    assert (guided - without).abs().max() > 1e-2 * without.abs().max()


@pytest.mark.parametrize("name", tiny.UNETS)
def test_each_controlnet_acts_and_runs_once_a_step(name: str) -> None:
    model = tiny.build(name)
    controls = [tiny.controlnet(model, seed) for seed in (0, 1)]
    results = [tiny.sample(model, steps=2)]
    for number in (1, 2):
        positive, negative = tiny.controlled(model, *controls[:number])
        with tiny.counted(controls[number - 1].control_model) as rows:
            results.append(tiny.sample(model, None, positive, negative, steps=2))
        assert rows == [2, 2]
        assert (results[-1] - results[-2]).abs().max() > 1e-2 * results[0].abs().max()


def test_flops_are_counted_as_pytorch_counts_them() -> None:
    query = torch.randn(1, 2, 64, 16)
    with Flops() as count:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert count.total == 2 * (2 * 2 * 64 * 64 * 16)
    layer = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(14, 5))
    for mode in (torch.no_grad, torch.inference_mode):
        x = torch.randn(2, 4, 16, 16)
        with FlopCounterMode(display=False) as theirs, mode():
            layer(x)
        with Flops() as ours, mode():
            layer(x)
        assert ours.total == theirs.get_total_flops() > 0
