"""``patch(pipe, rescale_mode=…)``: the modes in pipelines, beside ``guidance_rescale``."""

from __future__ import annotations

import pytest
import tiny as tiny_of_pag
import tiny_hosts
import torch
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.ops import reference

UNET, DIT = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
HOST = "StableDiffusionPipeline"
MODES = {"cfg": 0.7, "full": 0.7, "partial": 0.7, "snf": None}


def _by_hand(pipe, mode, rescale):
    """Stock, with another combination of what its denoiser returns."""

    def combine(noise, cfg, g, t, return_pred_text=False):
        *uncond, cond, perturbed = noise.chunk(3 if cfg else 2)
        out = reference.combine_guidance(
            uncond[0] if uncond else None, cond, perturbed, g, 3.0, rescale or 0.0, mode
        )
        return (out, cond) if return_pred_text else out

    pipe._apply_perturbed_attention_guidance = combine


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [*((UNET, m) for m in MODES), ("AnimateDiffPAGPipeline", "snf"), (DIT, "full"), (DIT, "snf")],
)
def test_modes_in_pipelines(name, mode, cfg):
    pipe = build(name, pag_applied_layers=PIPELINES[name].layers["all"])
    plain = latents(pipe, call_kwargs(name, pipe, cfg=cfg, batch=2))
    _by_hand(pipe, mode, MODES[mode])
    expected = latents(pipe, call_kwargs(name, pipe, cfg=cfg, batch=2))
    del pipe._apply_perturbed_attention_guidance
    pag_fast.patch(pipe, rescale_mode=mode, rescale=MODES[mode])
    out = latents(pipe, call_kwargs(name, pipe, cfg=cfg, batch=2))
    assert relative(out, expected) < 1e-5
    assert (relative(expected, plain) > 1e-4) == (cfg or mode != "snf")


WINDOWS = [{"start": 1}, {"stop": 1}, {"per_step": [0.0, 1.0, 0.0]}, {"per_step": [0.0] * 3}]


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_steps_without_pag_in_pipelines_without_pag(mode, window, cfg):
    """As in the pipeline of the same model that has PAG."""
    made, layers = [], tiny_hosts.HOSTS[HOST].layers["middle"]
    options = {"rescale_mode": mode, "schedule": pag_fast.Schedule(**window)}
    if MODES[mode]:
        options["rescale"] = MODES[mode]
    for tiny, name in ((tiny_of_pag, UNET), (tiny_hosts, HOST)):
        pipe = pag_fast.patch(tiny.build(name), layers, **options)
        made.append(tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=3, cfg=cfg)))
    assert relative(made[1], made[0]) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_takes_a_mode(name):
    pipe = pag_fast.patch(build(name), PIPELINES[name].layers["all"])
    plain = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe, PIPELINES[name].layers["all"], rescale_mode="full", rescale=1.0)
    out = latents(pipe, call_kwargs(name, pipe))
    assert torch.isfinite(out).all() and relative(out, plain) > 1e-3


def test_the_pipelines_own_rescale_is_mode_cfg():
    """Where the pipeline has one; ``rescale_mode`` gives it to the others."""
    pipe = pag_fast.patch(build(UNET))
    own = latents(pipe, call_kwargs(UNET, pipe, guidance_rescale=0.7))
    pag_fast.patch(pipe, rescale_mode="cfg", rescale=0.7)
    assert relative(latents(pipe, call_kwargs(UNET, pipe)), own) < 1e-6


@pytest.mark.parametrize("name", [UNET, "HunyuanDiTPAGPipeline"])
def test_rescale_asked_for_twice_is_refused(name, snapshot):
    pipe = pag_fast.patch(build(name), rescale_mode="full", rescale=0.5)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.7 and the patch rescale_mode="):
        latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.7))
    assert snapshot(pipe) == before
    latents(pipe, call_kwargs(name, pipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_mode": "half"}, "Unknown rescale_mode 'half': choose one of"),
        ({"rescale": 0.5}, "rescale=0.5 needs a rescale_mode"),
        ({"rescale_mode": "snf", "rescale": 0.5}, "needs another rescale_mode than 'snf'"),
        ({"rescale_mode": "full"}, "rescale_mode='full' needs rescale, a number from 0 to 1"),
        ({"rescale_mode": "full", "rescale": 1.5}, "a number from 0 to 1; got 1.5"),
        ({"rescale_mode": "cfg", "rescale": True}, "a number from 0 to 1; got True"),
    ],
)
def test_bad_options(options, message):
    pipe = build(UNET)
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **options)
    assert not hasattr(pipe, "_pag_fast")
