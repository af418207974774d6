"""Loops of a user's own: prompts that are made anew, and steps that no scheduler counts."""

from __future__ import annotations

import diffusers
import own_models
import pytest
import torch
from numerics import relative
from observed_steps import SCALE
from own_loops import LAYER, check, forward, patched, running, stepped
from own_loops import call as run_call

import pag_fast


def _made(new):
    """Each forward has a prompt of its own."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            (cond,) = forward(self, latents, t, new(prompt_embeds))
            noise_pred = cond
            if i % 3:
                (uncond,) = forward(self, latents, t, new(negative_prompt_embeds))
                noise_pred = uncond + g * (cond - uncond)
            noise_pred = noise_pred + self.extra(cond, latents, t, prompt_embeds)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    return loop


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("new", [torch.clone, lambda x: x * 1.0], ids=["clone", "product"])
def test_prompts_that_are_made_for_each_forward(new, batch):
    """What was free is another's soon, at the same address."""
    check(_made(new), batch=batch, steps=8)


def test_batches_whose_order_takes_turns():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        for i, t in enumerate(self.scheduler.timesteps):
            # into the same memory
            pair = (prompt_embeds, negative_prompt_embeds)[:: 1 if i % 2 else -1]
            text[: len(latents)], text[len(latents) :] = pair
            out = self.unet(torch.cat([latents] * 2), t, encoder_hidden_states=text).sample
            one, two = out.chunk(2)
            uncond, cond = (two, one) if i % 2 else (one, two)
            noise_pred = uncond + g * (cond - uncond)
            noise_pred = noise_pred + self.extra(cond, latents, t, prompt_embeds)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    check(loop, steps=8)


# ---- steps that no scheduler counts ----


def _by_hand(active, at=lambda t: t, name="t"):
    """PAG in the steps of ``active``; the steps are the loop's own."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            both = negative_prompt_embeds, prompt_embeds
            uncond, cond = forward(self, latents, at(t), *both)
            noise_pred = uncond + g * (cond - uncond)
            if i in active:
                noise_pred = noise_pred + self.extra(cond, latents, at(t), prompt_embeds)
            latents = latents - 0.1 * noise_pred
        return latents

    return loop


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "FlowMatchEulerDiscrete"])
@pytest.mark.parametrize(("window", "active"), [({"stop": 0.5}, (0, 1)), ({"start": 0.5}, (2, 3))])
def test_a_schedule_where_the_loop_makes_its_own_steps(scheduler, window, active):
    made = getattr(diffusers, f"{scheduler}Scheduler")()
    patch = {"schedule": pag_fast.Schedule(**window)}
    ran = check(_by_hand(active), scheduler=made, patch=patch)
    assert ran == {"shared": 2, "perturbed branch dropped": 2}


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_the_number_of_steps_of_an_earlier_call_tells_nothing(steps):
    """Loops of diffusers leave it on the pipeline, and others do not set it."""
    patch = {"schedule": pag_fast.Schedule(start=0.5)}
    made = diffusers.DDIMScheduler()
    with running(_by_hand((2, 3)), made) as pipe:
        pipe._num_timesteps = steps
        truth = run_call(pipe, truth=True)
        with pag_fast.patched(pipe, LAYER, pag_scale=SCALE, strict=True, **patch):
            assert relative(run_call(pipe), truth) < 1e-5
        assert type(pipe._num_timesteps) is int and pipe._num_timesteps == steps


def test_a_loop_without_its_denoiser_is_told_whatever_an_earlier_call_had():
    """A picture of strength 0 has no steps, and leaves that on the pipeline."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        return latents * g

    for left in (0, 3):
        with running(loop) as pipe:
            pipe._num_timesteps = left
            with (
                pag_fast.patched(pipe, LAYER, pag_scale=SCALE, strict=True),
                pytest.raises(ValueError, match="no forward of the unet was seen"),
            ):
                run_call(pipe)
            assert pipe._num_timesteps == left


def test_an_adaptive_scale_where_the_loop_makes_its_own_steps():
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    # s − a·(1000 − t) is zero from t = 700 on
    patch = {"pag_adaptive_scale": 0.01}

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            both = negative_prompt_embeds, prompt_embeds
            uncond, cond = forward(self, latents, t / 1000.0, *both)
            share = max(0.0, 3.0 - 0.01 * (1000.0 - float(t))) / 3.0
            noise_pred = uncond + g * (cond - uncond)
            extra = self.extra(cond, latents, t / 1000.0, prompt_embeds)
            noise_pred = noise_pred + share * extra
            latents = latents - 0.1 * noise_pred
        return latents

    assert check(loop, scheduler=made, patch=patch)["perturbed branch dropped"]


def test_a_loop_that_does_not_show_where_it_is_is_refused():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i in range(steps):
            both = negative_prompt_embeds, prompt_embeds
            uncond, cond = forward(self, latents, 0.3 + i, *both)
            noise_pred = uncond + g * (cond - uncond)
            latents = latents - 0.1 * noise_pred
        return latents

    scheduler = diffusers.EulerDiscreteScheduler()
    schedule = pag_fast.Schedule(stop=0.5)
    with (
        patched(loop, scheduler=scheduler, schedule=schedule) as pipe,
        pytest.raises(ValueError, match="makes its steps without its scheduler"),
    ):
        run_call(pipe)


class _Minimal:
    """A scheduler with what a loop needs of it."""

    order, config, step_index = 1, {}, None

    def __init__(self, kind):
        self.kind = kind

    def set_timesteps(self, steps):
        found = torch.linspace(999, 0, steps)
        if self.kind == "none":
            self.own = found
        elif self.kind == "lists made anew":
            type(self).timesteps = property(lambda _: found.tolist())
        else:
            self.timesteps = {"list": found.tolist(), "tensor": found}[self.kind]

    def step(self, noise, t, sample, return_dict=False):
        return (sample - 0.1 * noise,)


class _Pipeline(own_models.OwnPipeline):
    active = range(4)

    @torch.no_grad()
    def __call__(self, prompt_embeds, negative_prompt_embeds):
        source = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, own_models.SIZE, own_models.SIZE, generator=source)
        scheduler = self.scheduler
        scheduler.set_timesteps(4)
        words = torch.cat([negative_prompt_embeds, prompt_embeds])
        masks = (words[..., 0] != 0).long()
        steps = scheduler.own if scheduler.kind == "none" else scheduler.timesteps
        for i, t in enumerate(steps):
            t = torch.as_tensor(t)
            self.slow_on = i in self.active
            uncond, cond = self.predict(torch.cat([latents] * 2), t, words, masks).chunk(2)
            noise_pred = uncond + 4.0 * (cond - uncond)
            latents = scheduler.step(noise_pred, t, latents)[0]
        return latents


def _minimal(kind):
    pipe = own_models.build()
    pipe.__class__, pipe.scheduler = _Pipeline, type("Own", (_Minimal,), {})(kind)
    return pipe


@pytest.mark.parametrize("kind", ["tensor", "list", "lists made anew"])
@pytest.mark.parametrize("stop", [1.0, 0.5])
def test_schedulers_that_have_little(kind, stop):
    pipe, call, names = _minimal(kind), own_models.prompts(1), ["layers.1.mixer"]
    stock = pipe(**call)
    truth = _truth(pipe, names, call, range(int(4 * stop)))
    assert relative(truth, stock) > 1e-3
    schedule = pag_fast.Schedule(stop=stop)
    with pag_fast.patched(pipe, ["layers.1"], pag_scale=3.0, schedule=schedule, strict=True):
        assert relative(pipe(**call), truth) < 1e-5


def test_a_schedule_without_timesteps_is_refused():
    pipe, call = _minimal("none"), own_models.prompts(1)
    with pag_fast.patched(pipe, ["layers.1"], pag_scale=3.0):
        pipe(**call)
    schedule = pag_fast.Schedule(stop=0.5)
    with (
        pag_fast.patched(pipe, ["layers.1"], pag_scale=3.0, schedule=schedule),
        pytest.raises(ValueError, match="has no timesteps"),
    ):
        pipe(**call)


def _truth(pipe, names, call, active):
    """Slow PAG in the steps of ``active``."""
    own = pipe.predict

    def predict(latents, t, words, masks):
        uncond, cond = own(latents, t, words, masks).chunk(2)
        if pipe.slow_on and pipe.active is active:
            with pipe.transformer.perturb(names, own_models.SIZE**2, words.shape[1]):
                lost = own(latents[1:], t, words[1:], masks[1:])
            cond = cond + 3.0 / 4.0 * (cond - lost)
        return torch.cat([uncond, cond])

    pipe.predict, pipe.active = predict, active
    try:
        return pipe(**call)
    finally:
        del pipe.predict, pipe.active
