"""Schedules: their arithmetic by hand, the steps of schedulers, and what the device is asked."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from shallow import build

import pag_fast
from pag_fast import Schedule, Step
from pag_fast.runtime.guidance import _step, place_of, scale_at, scales_ahead

UNET = "StableDiffusionPAGPipeline"


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
        _step(pipe, place_of(pipe, t.expand(6), cache), cache) for t in scheduler.timesteps[begin:]
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


KDPM2 = [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading"}]
KDPM2 += [{"timestep_spacing": "trailing"}, {"beta_start": 0.00085, "beta_end": 0.012}]


@pytest.mark.parametrize("steps", [2, 4, 11])
@pytest.mark.parametrize("config", KDPM2, ids=str)
@pytest.mark.parametrize("name", ["KDPM2Discrete", "KDPM2AncestralDiscrete", "HeunDiscrete"])
def test_noise_levels_are_those_that_the_model_is_called_at(name, config, steps):
    """What the scheduler divides the model's input by, ``sqrt(σ² + 1)``."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    found = [step.sigma for step in _steps(scheduler, n=steps)]
    ones = torch.ones(1, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, found, strict=True):
        scaled = scheduler.scale_model_input(ones, t)
        assert sigma == pytest.approx((1 / scaled**2 - 1).clamp_min(0).sqrt().item(), rel=1e-4)
        scheduler.step(torch.zeros(1), t, torch.ones(1))


def test_a_scheduler_of_ones_own_between_two_noise_levels():
    """Without a table of what was trained its levels are where KDPM2 has them."""
    scheduler = SimpleNamespace(
        timesteps=torch.tensor([900.0, 700.0, 500.0]),
        sigmas=torch.tensor([9.0, 5.0, 5.0, 0.0]),
        sigmas_interpol=torch.tensor([9.0, 7.0, 7.0, 1.0]),
    )
    pipe = SimpleNamespace(scheduler=scheduler, pag_scale=3.0, pag_adaptive_scale=0.0)
    cache = {}
    found = [_step(pipe, place_of(pipe, t, cache), cache).sigma for t in scheduler.timesteps]
    assert found == [9.0, 7.0, 5.0]


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
        found = [place_of(pipe, t.clone() / divisor, cache) for t in scheduler.timesteps]
        assert found == list(range(7))
    with pytest.raises(ValueError, match="called at timestep -7, which is none of the scheduler's"):
        place_of(pipe, torch.tensor(-7.0), cache)


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
