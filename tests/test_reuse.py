"""Reuse of ``cond − perturbed``: against a slow pipeline that reuses it too."""

from __future__ import annotations

import pytest
import tiny
import torch
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents, slow_pag

import pag_fast
from pag_fast import Reuse
from pag_fast.models.layer_names import resolve

PAG = "StableDiffusionPAGPipeline"


def _slow(pipe, name, kwargs, fresh):
    layers = HOSTS[name].layers["middle"]
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    attentions = list(resolve(model, layers).values())
    with slow_pag(pipe, name, attentions, 3.0, kwargs[HOSTS[name].cfg], fresh):
        return latents(pipe, kwargs)


class _Drift:
    """Fresh again when the latents have moved by more than a bound."""

    def __init__(self, bound):
        self.bound, self.before, self.ran = bound, None, 0

    def __call__(self, index, x):
        if self.before is not None:
            moved = (x - self.before).abs().mean() / self.before.abs().mean()
            if moved <= self.bound:
                return False
        self.before, self.ran = x.clone(), self.ran + 1
        return True


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize(
    ("way", "name"),
    [("every", "StableDiffusionPipeline"), ("every", "FluxPipeline"), ("drift", "FluxPipeline")],
)
def test_equals_a_slow_pipeline_that_reuses(way, name, cfg):
    pipe = build(name)
    drift = _Drift(0.3)
    fresh = drift if way == "drift" else lambda index, x: index % 3 == 0
    reuse = Reuse(drift=0.3) if way == "drift" else Reuse(every=3)

    def kwargs():
        # every picture drifts by itself, and the slow pipeline asks about all of them at once
        batch = 1 if way == "drift" else 2
        return call_kwargs(name, pipe, cfg=cfg, steps=7, batch=batch)

    truth = _slow(pipe, name, kwargs(), fresh)
    layers = HOSTS[name].layers["middle"]
    with pag_fast.patched(pipe, layers):
        exact = latents(pipe, kwargs())
    with pag_fast.patched(pipe, layers, reuse=reuse):
        lossy, again = latents(pipe, kwargs()), latents(pipe, kwargs())
        steps = dict(pipe._pag_fast.steps)
    ran = drift.ran if way == "drift" else 3
    assert 1 < ran < 7
    assert steps == {"shared": 2 * ran, "difference reused": 2 * (7 - ran)}
    assert torch.equal(lossy, again)
    assert relative(lossy, truth) < 1e-5
    assert relative(lossy, exact) > 1e-3


def test_a_picture_drifts_by_itself():
    name = "StableDiffusionPipeline"
    pipe = pag_fast.patch(build(name), HOSTS[name].layers["middle"], reuse=Reuse(drift=0.3))
    both = call_kwargs(name, pipe, steps=7, batch=2)

    def rows(which):
        one = {
            k: v[which] if isinstance(v, torch.Tensor) and v.shape[:1] == (2,) else v
            for k, v in both.items()
        }
        one["generator"] = [torch.Generator().manual_seed(7 + index) for index in which]
        return latents(pipe, one)

    together = rows([0, 1])
    assert pipe._pag_fast.steps["difference reused"]
    for index in (0, 1):
        assert relative(together[index], rows([index])[0]) < 1e-5


@pytest.mark.parametrize("reuse", [Reuse(every=1), Reuse(drift=0.0)])
def test_the_bounds_that_are_exact(reuse):
    pipe = tiny.build(PAG)

    def run(**options):
        with pag_fast.patched(pipe, **options):
            return tiny.latents(pipe, tiny.call_kwargs(PAG, pipe, steps=4))

    assert torch.equal(run(reuse=reuse), run())


def test_a_pag_pipeline_and_a_pipeline_without_give_the_same_picture():
    """Their code differs: one is given the perturbed rows, the other makes them."""
    pag, name = tiny.build(PAG), "StableDiffusionPipeline"
    plain = build(name)
    layers = HOSTS[name].layers["middle"]
    pag_fast.patch(pag, layers, reuse=Reuse(every=2))
    pag_fast.patch(plain, layers, reuse=Reuse(every=2))
    first = tiny.latents(pag, tiny.call_kwargs(PAG, pag, steps=5))
    second = latents(plain, call_kwargs(name, plain, steps=5))
    assert relative(first, second) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes either every"),
        ({"every": 2, "drift": 0.1}, "takes either every"),
        ({"every": 0}, "a whole number of at least 1; got 0"),
        ({"every": 1.5}, "a whole number of at least 1; got 1.5"),
        ({"drift": -0.1}, "drift must be a number of at least 0, and finite; got -0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reuse(**arguments)


def test_bad_option():
    with pytest.raises(ValueError, match=r"reuse must be a pag_fast\.Reuse"):
        pag_fast.patch(tiny.build(PAG), reuse=2)
