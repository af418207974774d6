"""Loops of a user's own, on one tiny UNet, and slow PAG in them.

A loop is a function of a pipeline, prompts and latents. Where its guidance is whole it adds
``self.extra(cond, ...)``: nothing, or in the truth ``s·(cond − perturbed)`` from a forward of its
own.
"""

from __future__ import annotations

import contextlib

import tiny_hosts
import torch
from numerics import relative
from observed_steps import SCALE, SD, built_once

import pag_fast
from pag_fast.models.layer_names import resolve

LAYER = "mid"


def _extra(self, cond, latents, t, text):
    if not self.is_truth:
        return torch.zeros_like(cond)
    attentions = list(resolve(self.unet, [LAYER]).values())
    with tiny_hosts.perturbing(attentions, "", [0], 0):
        return SCALE * (cond - self.unet(latents, t, encoder_hidden_states=text).sample)


@contextlib.contextmanager
def running(loop, scheduler=None):
    """A pipeline whose ``__call__`` is ``loop``."""
    pipe = built_once(SD)
    cls, before = type(pipe), pipe.scheduler
    space = {"__call__": torch.no_grad()(loop), "extra": _extra, "is_truth": False}
    pipe.__class__ = type("Own", (cls,), space)
    pipe.scheduler = before if scheduler is None else scheduler
    try:
        yield pipe
    finally:
        pipe.__class__, pipe.scheduler = cls, before


def call(pipe, *, batch=1, steps=4, g=5.0, truth=False):
    """The picture of a call."""
    source = torch.Generator().manual_seed(1)
    cond, uncond = (torch.randn(batch, 5, 12, generator=source) for _ in range(2))
    latents = torch.randn(batch, 4, 8, 8, generator=source)
    pipe.is_truth = truth
    try:
        return pipe(cond, uncond, latents, steps, g)
    finally:
        pipe.is_truth = False


def check(loop, *, scheduler=None, patch=None, **arguments):
    """Patched equals slow PAG, twice, and without a warning; returns how its steps ran."""
    with running(loop, scheduler) as pipe:
        stock, truth = call(pipe, **arguments), call(pipe, **arguments, truth=True)
        assert relative(truth, stock) > 1e-3, "PAG makes no difference here"
        with pag_fast.patched(pipe, LAYER, pag_scale=SCALE, strict=True, **(patch or {})):
            fast = call(pipe, **arguments)
            ran = dict(pipe._pag_fast.steps)
            again = call(pipe, **arguments)
        assert relative(fast, truth) < 1e-5
        assert torch.equal(fast, again)
        assert torch.equal(call(pipe, **arguments), stock)
        return ran


@contextlib.contextmanager
def patched(loop, *, scheduler=None, **patch):
    """A pipeline of ``loop``, patched."""
    with (
        running(loop, scheduler) as pipe,
        pag_fast.patched(pipe, LAYER, pag_scale=SCALE, **patch),
    ):
        yield pipe


def forward(self, latents, t, *texts):
    """One forward for several prompts, and the prediction for each."""
    rows = [latents] * len(texts)
    out = self.unet(torch.cat(rows), t, encoder_hidden_states=torch.cat(texts)).sample
    return out.chunk(len(texts))


def stepped(self, noise_pred, t, latents):
    """The latents behind a step of the scheduler."""
    return self.scheduler.step(noise_pred, t, latents).prev_sample
