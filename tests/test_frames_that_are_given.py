"""Loops that are given some of the frames, and write those over what was predicted there."""

from __future__ import annotations

import warnings

import pytest
import torch
from numerics import relative
from sweep import specs
from sweep.check import attentions
from sweep.reference import PAG_SCALE, slow_pag
from sweep.spec import build, call_kwargs, models_of, small_pictures

import pag_fast
from pag_fast.runtime.loops.weighted_sums import fit, products

GIVEN = {
    spec.name: spec
    for spec in specs()
    if spec.name in ("Cosmos2VideoToWorldPipeline", "CosmosVideoToWorldPipeline")
}


@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("name", GIVEN)
def test_given_frames_are_no_predictions_of_an_earlier_step(name, cfg, steps):
    """What becomes of them is the same in every step, and says nothing of how others are made."""
    spec = GIVEN[name]
    pipe = build(spec)
    models = models_of(spec, pipe)

    def run():
        with small_pictures(pipe):
            return pipe(**call_kwargs(spec, cfg, 1, 1, steps))[0]

    with slow_pag(models, attentions(spec, models), spec, cfg):
        truth = run()
    stock = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pag_fast.patch(pipe, spec.layers, pag_scale=PAG_SCALE)
        found = run()
    assert relative(found, truth) < 1e-5 and relative(truth, stock) > 1e-3
    # of the first step, which has none to be compared with, and of no later one
    assert [text for text in pipe._pag_fast.fallbacks if "does more to the pred" not in text] == []
    assert sum(pipe._pag_fast.fallbacks.values()) == 1


def _sums(seed=0):
    torch.manual_seed(seed)
    one, two, before = torch.randn(3, 1, 4, 6, 8, 8).unbind()
    target = 2.5 * one - 1.5 * two
    return one, two, before, target


def _fit(columns, target, before=None):
    return fit(products(columns, target, before), range(len(columns)))


def test_what_has_not_changed_is_left_out():
    one, two, before, target = _sums()
    for frames in (1, 3, 5):
        given = target.clone()
        given[:, :, :frames] = before[:, :, :frames] * (1 + 1e-6)
        assert _fit([one, two], given).left > 0.1
        weights, left = _fit([one, two], given, before)
        assert weights == pytest.approx([2.5, -1.5], abs=1e-4) and left < 1e-4


def test_a_result_that_is_the_one_before_is_told():
    """All of it, or but for an element: nothing is left out."""
    one, two, before, _ = _sums()
    again = before.clone()
    assert _fit([one, two, again], before, again).weights[2] == pytest.approx(1.0)
    again[0, 0, 0, 0, 0] += 1.0
    weights, left = _fit([one, two, again], before, again)
    assert weights[2] == pytest.approx(1.0, abs=0.01) and left < 0.05
