"""What a patched pipeline draws, and whether stock draws the same."""

from __future__ import annotations

import torch
from numerics import relative
from tiny import call_kwargs, latents

import pag_fast


def assert_parity(pipe, name, tolerance=1e-5, **kwargs):
    stock = latents(pipe, call_kwargs(name, pipe, **kwargs))
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, **kwargs))
        again = latents(pipe, call_kwargs(name, pipe, **kwargs))
        steps = dict(pipe._pag_fast.steps)
    assert relative(patched, stock) < tolerance
    assert torch.equal(patched, again)
    return steps


def patched_build(pipe, name, layers=None, **kwargs):
    with pag_fast.patched(pipe, layers):
        return latents(pipe, call_kwargs(name, pipe, **kwargs))
