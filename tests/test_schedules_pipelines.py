"""Pipelines with a schedule: what runs in every step, and what is compiled for it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from numerics import observing, relative
from shallow import build
from tiny import PIPELINES, call_kwargs, latents
from torch._dynamo.utils import counters

import pag_fast
from pag_fast import CompileConfig, Schedule

UNET, DIT = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
EAGER = CompileConfig(backend="eager")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _rows(pipe, name, **kwargs):
    """Latents, and how many rows each denoiser call ran on behind the last fork."""
    rows = []
    model = getattr(pipe, PIPELINES[name].denoiser)
    last = model.conv_out if hasattr(model, "conv_out") else model.proj_out
    handle = last.register_forward_hook(observing(lambda _, args, out: rows.append(len(out))))
    out = latents(pipe, call_kwargs(name, pipe, **kwargs))
    handle.remove()
    return out, rows


@pytest.mark.parametrize("name", [UNET, "StableDiffusionXLPAGPipeline", DIT])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
def test_a_schedule_that_says_what_the_pipeline_does(name, cfg):
    pipe = build(name)
    kwargs = {"cfg": cfg, "steps": 5}
    stock = latents(pipe, call_kwargs(name, pipe, pag_adaptive_scale=0.006, **kwargs))
    other = latents(pipe, call_kwargs(name, pipe, **kwargs))
    assert relative(stock, other) > 1e-3
    pag_fast.patch(pipe, schedule=Schedule(adaptive=0.006))
    out, rows = _rows(pipe, name, **kwargs)
    assert relative(out, stock) < 1e-5
    full = 3 if cfg else 2
    assert set(rows) == {full, full - 1}
    assert pipe._pag_fast.steps["perturbed branch dropped"] == rows.count(full - 1)


@pytest.mark.parametrize("name", [UNET, "StableDiffusionControlNetPAGPipeline", DIT])
def test_outside_of_its_window_a_call_is_without_pag(name):
    """Stock with the scale turned to zero by a callback is the truth."""
    pipe = build(name)

    def zero_from_the_third_step(pipe, index, timestep, tensors):
        pipe._pag_adaptive_scale = 1000.0 if index >= 1 else 0.0
        return tensors

    kwargs = {"steps": 4, "callback_on_step_end": zero_from_the_third_step}
    stock = latents(pipe, call_kwargs(name, pipe, **kwargs))
    for window in ({"stop": 2}, {"stop": 0.5}, {"per_step": [1, 1, 0, 0]}):
        pag_fast.patch(pipe, schedule=Schedule(**window))
        out, rows = _rows(pipe, name, steps=4)
        assert relative(out, stock) < 1e-5
        assert rows == [3, 3, 2, 2]
        plain, rows = _rows(pipe, name, steps=4, pag_scale=0.0)
        assert rows == [2, 2, 2, 2] and relative(plain, stock) > 1e-3


@pytest.mark.parametrize("name", [UNET, DIT])
def test_a_window_that_opens_late(name):
    """The other way round: what is kept from the steps without the perturbed rows still fits."""
    pipe = build(name)

    def begin_at_the_third_step(pipe, index, timestep, tensors):
        # zero would turn PAG off for the whole call
        pipe._pag_scale = 3.0 if index >= 1 else 1e-30
        return tensors

    kwargs = {"steps": 4, "callback_on_step_end": begin_at_the_third_step}
    stock = latents(pipe, call_kwargs(name, pipe, pag_scale=1e-30, **kwargs))
    pag_fast.patch(pipe, schedule=Schedule(start=2))
    out, rows = _rows(pipe, name, steps=4)
    assert relative(out, stock) < 1e-5
    assert rows == [2, 2, 3, 3]


def test_rows_where_the_model_is_called_twice_per_step():
    pipe = pag_fast.patch(build(UNET), schedule=Schedule(start=1, stop=3))
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    assert _rows(pipe, UNET, steps=3)[1] == [2, 3, 3, 2, 2]


def test_rows_of_image_to_image():
    name = "StableDiffusionPAGImg2ImgPipeline"
    pipe = pag_fast.patch(build(name), schedule=Schedule(start=0.5))
    assert _rows(pipe, name, steps=8, strength=0.5)[1] == [2, 2, 3, 3]
    pag_fast.patch(pipe, schedule=Schedule(per_step=[0, 1, 0, 1]))
    assert _rows(pipe, name, steps=8, strength=0.5)[1] == [2, 3, 2, 3]


def test_a_schedule_of_zeros_is_no_pag():
    pipe = build(UNET)
    plain = latents(pipe, call_kwargs(UNET, pipe, steps=3, pag_scale=0.0))
    pag_fast.patch(pipe, schedule=Schedule(per_step=lambda step: 0.0))
    out, rows = _rows(pipe, UNET, steps=3)
    assert relative(out, plain) < 1e-5 and rows == [2, 2, 2]


def test_rows_in_a_window_of_noise_levels():
    pipe = build(UNET)
    pipe.scheduler.set_timesteps(6)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    sigmas = ((1 - kept) / kept).sqrt().tolist()
    schedule = Schedule(sigma_start=sigmas[1] * 1.001, sigma_end=sigmas[4] * 1.001)
    pag_fast.patch(pipe, schedule=schedule)
    assert _rows(pipe, UNET, steps=6)[1] == [2, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("name", [n for n in PIPELINES if n not in (UNET, DIT)])
def test_every_pipeline_takes_a_window(name):
    pipe = pag_fast.patch(build(name), schedule=Schedule(start=1, stop=2))
    latents(pipe, call_kwargs(name, pipe, steps=3))
    assert dict(pipe._pag_fast.steps) == {"perturbed branch dropped": 2, "shared": 1}


def test_what_does_not_fit_the_call_is_an_error_and_leaves_the_pipeline(snapshot):
    pipe = build(UNET)
    pag_fast.patch(pipe, schedule=Schedule(per_step=[1.0, 0.5]))
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="per_step has 2 factors and the call 3 steps"):
        latents(pipe, call_kwargs(UNET, pipe, steps=3))
    assert snapshot(pipe) == before

    def tensor_later(step):
        return 1.0 if step.index == 0 else torch.tensor([1.0])

    pag_fast.patch(pipe, schedule=Schedule(per_step=tensor_later))
    with pytest.raises(ValueError, match="What per_step returns for step 1 must be a number"):
        latents(pipe, call_kwargs(UNET, pipe, steps=3))
    assert snapshot(pipe) == before
    pag_fast.patch(pipe, schedule=Schedule(adaptive=0.1, form="comfyui"))
    with pytest.raises(ValueError, match=r"pag_adaptive_scale=0\.5 and the schedule adaptive=0\.1"):
        latents(pipe, call_kwargs(UNET, pipe, pag_adaptive_scale=0.5))
    assert snapshot(pipe) == before


def test_explain_says_the_schedule():
    pipe = build(UNET)
    line = "PAG scale: the call's pag_scale and pag_adaptive_scale"
    assert line in str(pag_fast.explain(pipe, flops=False))
    schedule = Schedule(
        adaptive=0.2, form="comfyui", start=2, stop=0.8, sigma_start=5, sigma_end=0.5, per_step=[1]
    )
    pag_fast.patch(pipe, schedule=schedule)
    found = pag_fast.explain(pipe, flops=False)
    assert found.as_dict()["schedule"] == (
        "s − s·a⁴·(1000 − t) with a = 0.2; steps from 2 to before 80 %; 0.5 < σ ≤ 5; "
        "times a factor for each of 1 steps"
    )
    assert str(Schedule()) == "the pipeline's scale in every step"


# ---- compiled ----


SMALL = "PixArtSigmaPAGPipeline"


def _small():
    """One block: what is traced here is traced often."""
    return build(SMALL, num_layers=1, pag_applied_layers=["blocks.0"])


def _graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("window", "graphs"),
    [({"start": 1, "stop": 3}, 2), ({"stop": 2}, 2), ({"stop": 99}, 1)],
    ids=["late", "early", "always"],
)
def test_both_graphs_are_compiled_in_the_first_step(window, graphs):
    pipe = _small()
    schedule = Schedule(**window)
    with pag_fast.patched(pipe, schedule=schedule):
        eager = latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    after, step = [], pipe.scheduler.step

    def counted(*args, **kwargs):
        after.append(_graphs())
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    pag_fast.patch(pipe, compile=EAGER, schedule=schedule)
    out = latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    assert relative(out, eager) < 1e-5
    assert after == [graphs] * 4
    assert pipe._pag_fast.steps.total() == 4
    latents(pipe, call_kwargs(SMALL, pipe, steps=7))
    assert _graphs() == graphs


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "the user's"])
def test_another_schedule_keeps_the_graphs(ours):
    """Other settings do not."""
    pipe = _small()
    options = {"compile": EAGER} if ours else {}
    pag_fast.patch(pipe, schedule=Schedule(stop=2), **options)
    if not ours:
        pipe.transformer.compile(fullgraph=True, backend="eager", dynamic=False)
    latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    assert _graphs() == 2
    half = Schedule(start=1, per_step=lambda step: 0.5)
    for schedule in (half, Schedule(stop=0.25), None):
        pag_fast.patch(pipe, schedule=schedule, **options)
        assert dict(pipe._pag_fast.steps) == {}
        out = latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    with pag_fast.patched(pipe, schedule=half, **options):
        latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    latents(pipe, call_kwargs(SMALL, pipe, steps=4))
    assert _graphs() == 2
    pag_fast.patch(pipe, share_branches=False, **options)
    assert relative(latents(pipe, call_kwargs(SMALL, pipe, steps=4)), out) < 1e-5
    assert _graphs() > 2
