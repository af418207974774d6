"""Schedules: their arithmetic by hand, what runs in every step, and what the device is asked."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from numerics import observing, relative
from shallow import build
from tiny import PIPELINES, call_kwargs, latents
from torch._dynamo.utils import counters

import pag_fast
from pag_fast import CompileConfig, Schedule, Step
from pag_fast.runtime.guidance import _position, _step, scale_at, scales_ahead

UNET, DIT = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
EAGER = CompileConfig(backend="eager")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _at(index=0, *, count=10, timestep=500.0, sigma=1.0, scale=3.0) -> Step:
    return Step(index, count, timestep, sigma, scale)


# ---- formulas ----


@pytest.mark.parametrize(
    ("form", "adaptive", "last"),
    [
        # the timestep at which the scale 3 has fallen to 0, by hand: 1000 − 3 / a, 1000 − 1 / a⁴
        ("diffusers", 0.005, 400.0),
        ("diffusers", 0.05, 940.0),
        ("diffusers", 0.2, 985.0),
        ("comfyui", 0.2, 375.0),
        ("comfyui", 0.25, 744.0),
        ("comfyui", 0.3, 876.54),
        ("comfyui", 0.5, 984.0),
    ],
)
def test_adaptive_scale_dies_where_the_formula_says(form, adaptive, last):
    schedule = Schedule(adaptive=adaptive, form=form)
    assert schedule.scale(_at(timestep=1000.0)) == 3.0
    assert schedule.scale(_at(timestep=(1000 + last) / 2)) == pytest.approx(1.5, rel=1e-4)
    assert 0.0 < schedule.scale(_at(timestep=last + 1)) < 0.2
    assert schedule.scale(_at(timestep=last - 1)) == schedule.scale(_at(timestep=0.0)) == 0.0


def test_comfyuis_form_falls_in_proportion_to_the_scale():
    """Diffusers' does not: half the scale dies earlier."""
    for scale in (1.5, 3.0, 6.0):
        comfyui = Schedule(adaptive=0.2, form="comfyui").scale(_at(timestep=600.0, scale=scale))
        assert comfyui == pytest.approx(0.36 * scale)
        diffusers_form = Schedule(adaptive=0.005).scale(_at(timestep=600.0, scale=scale))
        assert diffusers_form == pytest.approx(max(0.0, scale - 2.0))


@pytest.mark.parametrize(
    ("window", "count", "active"),
    [
        ({}, 4, [0, 1, 2, 3]),
        ({"stop": 0.5}, 4, [0, 1]),
        ({"start": 0.3, "stop": 0.7}, 10, [3, 4, 5, 6]),
        ({"start": 0.25}, 10, [3, 4, 5, 6, 7, 8, 9]),
        ({"start": 0.28, "stop": 0.4}, 25, [7, 8, 9]),
        ({"start": 2}, 5, [2, 3, 4]),
        ({"start": 1, "stop": 3}, 5, [1, 2]),
        ({"start": 1, "stop": 0.5}, 6, [1, 2]),
        ({"stop": 1}, 5, [0]),
        ({"stop": 99}, 3, [0, 1, 2]),
    ],
)
def test_windows_of_steps(window, count, active):
    schedule = Schedule(**window)
    scales = [schedule.scale(_at(index, count=count)) for index in range(count)]
    assert scales == [3.0 if index in active else 0.0 for index in range(count)]


@pytest.mark.parametrize(
    ("window", "active"),
    [
        ({"sigma_start": 5.0, "sigma_end": 0.5}, [5.0, 1.0]),
        ({"sigma_start": 5.0}, [5.0, 1.0, 0.5, 0.0]),
        ({"sigma_end": 0.5}, [14.6, 5.0, 1.0]),
        ({"sigma_start": -1.0, "sigma_end": -1.0}, [14.6, 5.0, 1.0, 0.5, 0.0]),
        ({"sigma_end": 0.0}, [14.6, 5.0, 1.0, 0.5]),
    ],
)
def test_windows_of_noise_levels_are_open_below_and_closed_above(window, active):
    schedule = Schedule(**window)
    levels = [14.6, 5.0, 1.0, 0.5, 0.0]
    assert [s for s in levels if schedule.scale(_at(sigma=s)) > 0.0] == active


def test_factors_and_windows_multiply():
    factors = [0.0, 0.5, 1.0, 2.0]
    schedule = Schedule(per_step=factors, start=1, sigma_end=0.1)
    scales = [schedule.scale(_at(i, count=4, sigma=3.0 - i)) for i in range(4)]
    assert scales == [0.0, 1.5, 3.0, 0.0]
    factors[1] = 9.0  # the schedule has its own
    assert schedule.scale(_at(1, count=4)) == 1.5
    by_function = Schedule(per_step=lambda step: step.timestep / 1000, adaptive=0.001)
    assert by_function.scale(_at(timestep=500.0)) == pytest.approx(2.5 * 0.5)
    assert hash(schedule) == hash(Schedule(per_step=(0.0, 0.5, 1.0, 2.0), start=1, sigma_end=0.1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"form": "a1111"},
            "Unknown form 'a1111' of the adaptive scale: choose one of 'diffusers'",
        ),
        ({"adaptive": -0.1}, "adaptive must be a number of at least 0, and finite; got -0.1"),
        ({"adaptive": 2, "form": "comfyui"}, "adaptive must be between 0 and 1"),
        ({"start": 1.5}, "start must be a fraction of the steps, 0.0 to 1.0, or a whole step"),
        ({"stop": True}, "stop must be a number"),
        ({"start": -1}, "start must be a number of at least 0, and finite; got -1"),
        ({"start": 0.5, "stop": 0.5}, "No step is between start=0.5 and stop=0.5"),
        ({"start": 3, "stop": 2}, "No step is between start=3 and stop=2"),
        ({"sigma_start": 1.0, "sigma_end": 2.0}, "No noise level is above sigma_end=2.0"),
        ({"sigma_start": float("nan")}, "sigma_start must be a number, and finite; got nan"),
        ({"sigma_end": torch.tensor([1.0])}, "sigma_end must be a number"),
        ({"per_step": []}, "per_step must be a sequence of numbers"),
        ({"per_step": "abc"}, "per_step must be a sequence of numbers"),
        ({"per_step": [1.0, -2.0]}, r"per_step\[1\] must be a number of at least 0"),
    ],
)
def test_bad_schedules(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_a_schedule_is_an_option_of_patch():
    pipe = build(UNET)
    with pytest.raises(ValueError, match=r"schedule must be a pag_fast\.Schedule; got 0\.5"):
        pag_fast.patch(pipe, schedule=0.5)
    assert not hasattr(pipe, "_pag_fast")


# ---- steps and noise levels of schedulers ----


def _steps(scheduler, n=5, begin=0, **attributes):
    scheduler.set_timesteps(n)
    pipe = SimpleNamespace(scheduler=scheduler, pag_scale=3.0, pag_adaptive_scale=0.0, **attributes)
    cache = {}
    return [
        _step(pipe, _position(pipe, t.expand(6), cache), cache) for t in scheduler.timesteps[begin:]
    ]


@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM"]
)
def test_noise_levels_are_those_of_the_timesteps(name):
    """``sqrt((1 − ᾱ) / ᾱ)``, from wherever the scheduler keeps it."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing="leading")
    steps = _steps(scheduler)
    assert [s.timestep for s in steps] == [float(t) for t in scheduler.timesteps]
    assert [s.index for s in steps] == list(range(len(steps)))
    for step in steps:
        kept = scheduler.alphas_cumprod[round(step.timestep)].double().item()
        assert step.sigma == pytest.approx(((1 - kept) / kept) ** 0.5, rel=1e-3)
        assert step.count == len(steps)


def test_noise_levels_of_flow_matching_are_0_to_1():
    steps = _steps(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert [s.sigma for s in steps] == pytest.approx([s.timestep / 1000 for s in steps])
    assert steps[0].sigma == 1.0 and 0.0 < steps[-1].sigma < 1.0


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "FlowMatchHeunDiscrete"])
def test_schedulers_that_call_the_model_twice_have_a_position_for_each(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    steps = _steps(scheduler, n=4)
    assert [s.index for s in steps] == list(range(7)) and steps[0].count == 7
    sigmas = [s.sigma for s in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    if name == "HeunDiscrete":
        assert sigmas[1] == sigmas[2] and sigmas[3] == sigmas[4]
    if name == "KDPM2Discrete":
        # in between, as the model is called there
        assert sigmas[0] > sigmas[1] > sigmas[2] > sigmas[3]


def test_image_to_image_counts_the_steps_it_takes():
    scheduler = diffusers.EulerDiscreteScheduler()
    steps = _steps(scheduler, n=10, begin=6, _num_timesteps=4)
    assert [(s.index, s.count) for s in steps] == [(i, 4) for i in range(4)]
    assert steps[0].sigma == pytest.approx(scheduler.sigmas[6].item())
    # denoising_end: the scheduler has more steps than the call
    assert {s.count for s in _steps(scheduler, n=10, _num_timesteps=7)} == {7}


def test_timesteps_that_are_copies_are_found_by_value():
    """HunyuanDiT makes a tensor of its own; some transformers take thousandths; Heun repeats."""
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    for divisor in (1, 1000):
        pipe = SimpleNamespace(scheduler=scheduler, pag_scale=3.0, pag_adaptive_scale=0.0)
        cache = {}
        found = [_position(pipe, t.clone() / divisor, cache) for t in scheduler.timesteps]
        assert found == list(range(7))
    with pytest.raises(ValueError, match="called at timestep -7, which is none of the scheduler's"):
        _position(pipe, torch.tensor(-7.0), cache)


def test_a_scheduler_without_noise_levels():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    pipe = SimpleNamespace(scheduler=scheduler, pag_scale=3.0, pag_adaptive_scale=0.0)
    t = scheduler.timesteps[1]
    assert scale_at(pipe, t, {}, Schedule(adaptive=0.004)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="need a scheduler with noise levels"):
        scale_at(pipe, t, {}, Schedule(sigma_end=0.5))


def test_the_device_is_not_asked():
    """Meta tensors have no values: one read per call of timesteps and noise levels is all."""
    reads = []

    class Steps(torch.Tensor):
        def tolist(self):
            reads.append(self)
            return [900.0, 700.0, 500.0, 300.0, 100.0]

    steps, sigmas = (torch.empty(5, device="meta").as_subclass(Steps) for _ in range(2))
    pipe = SimpleNamespace(
        scheduler=SimpleNamespace(timesteps=steps, sigmas=sigmas),
        pag_scale=3.0,
        pag_adaptive_scale=0.0,
    )
    schedule = Schedule(per_step=lambda step: step.index, start=1, sigma_end=200.0, adaptive=0.001)
    cache = {}
    scales = [scale_at(pipe, steps[i].expand(6), cache, schedule) for i in range(5)]
    assert scales == pytest.approx([0.0, 2.7, 5.0, 6.9, 0.0])
    assert list(scales_ahead(pipe, steps[2], cache, schedule)) == pytest.approx([5.0, 6.9, 0.0])
    assert len(reads) == 2


def test_without_a_schedule_the_steps_ahead_are_the_pipelines():
    pipe = SimpleNamespace(
        scheduler=diffusers.DDIMScheduler(), pag_scale=3.0, pag_adaptive_scale=0.01
    )
    pipe.scheduler.set_timesteps(5)  # 800, 600, …
    t = pipe.scheduler.timesteps[0]
    assert list(scales_ahead(pipe, t, {})) == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0])
    pipe.pag_adaptive_scale = 0.0
    assert list(scales_ahead(pipe, "nothing to look up", {})) == [3.0]


# ---- pipelines ----


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
