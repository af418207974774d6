"""Reuse of ``cond − perturbed`` where a loop is not one forward of cond in each later step."""

from __future__ import annotations

import re

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
import torch.nn.functional as F
from numerics import relative
from own_loops import call, forward, patched, stepped

import pag_fast
from pag_fast import Reuse
from pag_fast.runtime.loops.order import EARLIER, LATER, SAME, StepOrder

ANIMATED, SD, SD3 = "AnimateDiffPAGPipeline", "StableDiffusionPAGPipeline", "SD3"
SCHEDULERS = {"DDIM": diffusers.DDIMScheduler, "Euler": diffusers.EulerDiscreteScheduler}
BOTH = pytest.mark.parametrize(
    "reuse", [Reuse(every=3), Reuse(drift=100.0)], ids=["every", "drift"]
)
OFF = r"reuse is off in this call: its loop runs cond several times in a step"

# how a loop has its timesteps
TIMES = {
    "taken out": lambda timesteps: timesteps,
    "numbers": lambda timesteps: timesteps.tolist(),
    "copies": lambda timesteps: (t.clone() for t in timesteps),
}


def _scaled(self, latents, t):
    # of two schedulers, one counts its steps
    counts = hasattr(self.scheduler, "step_index")
    return self.scheduler.scale_model_input(latents, t) if counts else latents


def _guided(self, latents, t, cond, uncond, g):
    of_uncond, of_cond = forward(self, _scaled(self, latents, t), t, uncond, cond)
    return of_uncond + g * (of_cond - of_uncond)


# ---- several forwards in a step ----


def _by_views(times, counted):
    """Views of a wide picture, one behind the other; ``counted``: by the loop's ``i``."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        latents = torch.cat([latents, latents.flip(1)], -1)
        for t in times(self.scheduler.timesteps):
            found = []
            for number, view in enumerate(latents.chunk(2, -1)):
                if counted:
                    i = number  # noqa: F841
                scaled = _scaled(self, view, t)
                uncond, cond = forward(self, scaled, t, negative_prompt_embeds, prompt_embeds)
                noise_pred = uncond + g * (cond - uncond)
                found += [noise_pred]
            latents = stepped(self, torch.cat(found, -1), t, latents)
        return latents

    return loop


@BOTH
@pytest.mark.parametrize("counted", [True, False], ids=["i", "no i"])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_view_takes_the_difference_of_another_one(scheduler, times, counted, reuse):
    loop = _by_views(TIMES[times], counted)

    def run(**patch):
        with patched(loop, scheduler=SCHEDULERS[scheduler](), **patch) as pipe:
            return call(pipe, steps=3), dict(pipe._pag_fast.steps)

    plain, _ = run()
    with pytest.warns(UserWarning, match=OFF):
        found, steps = run(reuse=reuse)
    assert torch.equal(found, plain)
    assert steps == {"shared": 6}
    # which is exact, and has nothing to turn off
    exact, _ = run(reuse=Reuse(every=1))
    assert torch.equal(exact, plain)


def test_no_evaluation_of_a_step_takes_the_difference_of_another_one():
    """As the methods of Heun do by hand."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            first = _guided(self, latents, t, prompt_embeds, negative_prompt_embeds, g)
            reached = latents - 0.1 * first
            second = _guided(self, reached, t, prompt_embeds, negative_prompt_embeds, g)
            latents = latents - 0.05 * (first + second)
        return latents

    def run(**patch):
        with patched(loop, **patch) as pipe:
            return call(pipe, steps=3)

    plain = run()
    with pytest.warns(UserWarning, match=OFF):
        assert torch.equal(run(reuse=Reuse(every=2)), plain)


# ---- time goes back ----


def _in_windows(times, cut):
    """Each window is denoised from the first step on, in one frame."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        found = []
        for part in cut(latents):
            self.scheduler.set_timesteps(steps)
            for t in times(self.scheduler.timesteps):
                noise_pred = _guided(self, part, t, prompt_embeds, negative_prompt_embeds, g)
                part = stepped(self, noise_pred, t, part)
            found += [part]
        return torch.cat(found, -1)

    return loop


CUTS = {
    "alike": lambda x: [x, x.flip(1)],
    "of other sizes": lambda x: [x, torch.cat([x, x], -1), x.flip(1)],
}


@BOTH
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_window_begins_with_a_difference_of_its_own(scheduler, times, cut, reuse):
    def run(cut):
        loop = _in_windows(TIMES[times], cut)
        with patched(loop, scheduler=SCHEDULERS[scheduler](), reuse=reuse) as pipe:
            found = call(pipe, steps=4)
            assert pipe._pag_fast.steps["difference reused"]
            assert not any(map(re.compile(OFF).match, pipe._pag_fast.fallbacks))
            return found

    together = run(CUTS[cut])
    number = len(CUTS[cut](torch.zeros(1, 4, 8, 8)))
    alone = [run(lambda x, index=index: [CUTS[cut](x)[index]]) for index in range(number)]
    assert relative(together, torch.cat(alone, -1)) < 1e-5


@pytest.mark.parametrize("schedule", [None, pag_fast.Schedule(stop=0.4)], ids=["all", "window"])
@pytest.mark.parametrize("name", [ANIMATED, "AnimateDiffPipeline"])
def test_every_iteration_of_free_init_begins_anew(name, schedule):
    module = tiny if name == ANIMATED else tiny_hosts
    pipe = module.build(name)
    pipe.enable_free_init(num_iters=2, use_fast_sampling=False)
    options = {"reuse": Reuse(every=10), "schedule": schedule, "strict": True}
    more = {} if module is tiny else {"pag_scale": 3.0}
    with pag_fast.patched(pipe, "mid", **options, **more):
        module.latents(pipe, module.call_kwargs(name, pipe, batch=1, steps=4))
        steps = dict(pipe._pag_fast.steps)
    wanted = {"shared": 2, "difference reused": 6}
    if schedule is not None:
        wanted = {"shared": 2, "difference reused": 2, "perturbed branch dropped": 4}
    assert steps == wanted


# ---- other latents ----


@BOTH
@pytest.mark.parametrize("size", [(16, 16), (8, 16), (4, 8)])
@pytest.mark.parametrize("name", [SD, SD3, "StableDiffusionPipeline"])
def test_a_callback_resizes_the_latents(name, size, reuse):
    """From there on the picture is what a call that begins there has."""
    name = {SD3: "StableDiffusion3PAGPipeline"}.get(name, name)
    module = tiny if name in tiny.PIPELINES else tiny_hosts
    pipe, ran = module.build(name), []

    def callback(pipe, step, timestep, kwargs):
        ran.append(dict(pipe._pag_fast.steps))
        if step != 1:
            return {}
        return {"latents": F.interpolate(kwargs["latents"], size=size)}

    more = {} if module is tiny else {"pag_scale": 3.0}
    layers = "blocks.1" if "3" in name else "mid"
    kwargs = {**module.call_kwargs(name, pipe, batch=1, steps=4), "callback_on_step_end": callback}
    with pag_fast.patched(pipe, layers, reuse=reuse, strict=True, **more):
        found = module.latents(pipe, kwargs)
    assert found.shape[-2:] == size
    assert [counts.get("difference reused", 0) for counts in ran] == [0, 1, 1, 2]


# ---- the order itself ----


def _times(*values):
    return list(torch.tensor(values))


_SAME_TIMESTEP = _times(9.0, 9.0, 5.0)
_META = list(torch.empty(3, device="meta"))  # raises where somebody asks for its value


class _Scheduler:
    step_index = None


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        # (t, the scheduler's index, the denoiser's timestep)
        ((_META[0], None, None), (_META[1], None, None), LATER),
        ((_META[1], None, None), (_META[1], None, None), SAME),
        ((_META[2], 2, None), (_META[0], 0, None), EARLIER),
        ((_SAME_TIMESTEP[0], None, None), (_SAME_TIMESTEP[1], None, None), LATER),
        ((9.0, None, None), (5.0, None, None), LATER),
        ((9.0, None, None), (9.0, None, None), SAME),
        ((9.0, 0, None), (9.0, 1, None), LATER),
        ((9.0, 1, None), (9.0, 1, None), SAME),
        ((5.0, None, None), (9.0, None, None), EARLIER),
        ((9.0, 3, None), (5.0, None, None), EARLIER),
        ((None, None, None), (None, 1, None), LATER),
        ((None, 1, None), (None, 1, None), SAME),
        ((None, 3, None), (None, None, None), EARLIER),
        ((None, None, torch.tensor([9.0])), (None, None, torch.tensor([5.0])), LATER),
        ((None, None, torch.tensor([9.0])), (None, None, 9), SAME),
        ((None, None, None), (None, None, None), SAME),
        (("9", None, None), ("5", None, None), SAME),
    ],
)
def test_order_of_two_forwards(before, now, wanted):
    order, scheduler, found = StepOrder(), _Scheduler(), []
    for t, index, at in (before, now):
        scheduler.step_index = index
        found += [order.look(scheduler, {} if at is None else {"timestep": at}, {"t": t})]
    assert found == [LATER, wanted]
