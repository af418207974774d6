"""PAG added to pipelines that have none: against three separate forwards, and nothing left."""

from __future__ import annotations

import functools

import pytest
import torch
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents, slow_pag

import pag_fast
from pag_fast.layers import resolve

CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])


@functools.lru_cache(maxsize=2)
def _pipe(name):
    return build(name)


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _slow(pipe, name, layers, kwargs, pag_scale=3.0):
    attentions = list(resolve(_model(pipe), layers).values())
    scale = kwargs[HOSTS[name].cfg]
    with slow_pag(pipe, name, attentions, pag_scale, scale):
        return latents(pipe, kwargs)


@pytest.mark.parametrize("batch", [1, 2])
@CFG
@pytest.mark.parametrize("layers", ["middle", "all"])
@pytest.mark.parametrize("name", HOSTS)
def test_equals_three_separate_forwards(name, layers, cfg, batch):
    pipe = _pipe(name)
    layers = HOSTS[name].layers[layers]

    def kwargs():
        return call_kwargs(name, pipe, batch=batch, cfg=cfg)

    stock = latents(pipe, kwargs())
    truth = _slow(pipe, name, layers, kwargs())
    assert relative(truth, stock) > 1e-3, "PAG makes no difference here"
    with pag_fast.patched(pipe, layers, pag_scale=3.0):
        patched, again = latents(pipe, kwargs()), latents(pipe, kwargs())
        steps = dict(pipe._pag_fast.steps)
        assert not pipe._pag_fast.fallbacks
    assert relative(patched, truth) < 1e-5
    assert torch.equal(patched, again), "a second call gives another picture"
    assert steps == {"shared": 4}
    assert torch.equal(latents(pipe, kwargs()), stock), "unpatching changed the picture"
