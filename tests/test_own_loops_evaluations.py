"""Loops of a user's own that run their denoiser several times in a step, or for some pictures."""

from __future__ import annotations

import pytest
import torch
from own_loops import call, check, forward, patched, stepped


def _both(self, latents, t, prompt_embeds, negative_prompt_embeds, apart):
    if apart:
        (cond,) = forward(self, latents, t, prompt_embeds)
        (uncond,) = forward(self, latents, t, negative_prompt_embeds)
        return uncond, cond
    return forward(self, latents, t, negative_prompt_embeds, prompt_embeds)


def _heun(number, apart, inside):
    """Heun's method; ``inside``: its evaluations are a function of the loop's."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)

        def noise(x, t):
            both = prompt_embeds, negative_prompt_embeds
            uncond, cond = _both(self, x, number(t), *both, apart)
            extra = self.extra(cond, x, number(t), prompt_embeds)
            return uncond + g * (cond - uncond) + extra

        for _i, t in enumerate(self.scheduler.timesteps):
            if inside:
                noise_pred = noise(latents, t)
                noise_pred = 0.5 * (noise_pred + noise(latents - 0.1 * noise_pred, t - 5))
            else:
                both = prompt_embeds, negative_prompt_embeds
                uncond, cond = _both(self, latents, number(t), *both, apart)
                noise_pred = uncond + g * (cond - uncond)
                noise_pred = noise_pred + self.extra(cond, latents, number(t), prompt_embeds)
                ahead, first = latents - 0.1 * noise_pred, noise_pred
                uncond, cond = _both(self, ahead, number(t - 5), *both, apart)
                noise_pred = uncond + g * (cond - uncond)
                noise_pred = noise_pred + self.extra(cond, ahead, number(t - 5), prompt_embeds)
                noise_pred = 0.5 * (first + noise_pred)
            latents = latents - 0.1 * noise_pred
        return latents

    return loop


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("number", [float, int, lambda t: t], ids=["float", "int", "tensor"])
def test_two_evaluations_in_a_step(number, apart, inside, batch):
    """Both have PAG, of their own; a number as timestep is no other setting of one evaluation."""
    ran = check(_heun(number, apart, inside), batch=batch, steps=2)
    assert ran == {"shared": 4}


def test_a_step_that_is_run_again():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for _i, t in enumerate(self.scheduler.timesteps):
            for _again in range(3):
                (cond,) = forward(self, latents, t, prompt_embeds)
                (uncond,) = forward(self, latents, t, negative_prompt_embeds)
                noise_pred = uncond + g * (cond - uncond)
                noise_pred = noise_pred + self.extra(cond, latents, t, prompt_embeds)
                latents = latents - 0.05 * noise_pred
        return latents

    check(loop, steps=2)


@pytest.mark.parametrize("mask", ["half", "left"])
def test_two_prompts_in_one_guided_prediction_are_refused(mask):
    """Which part of PAG each of them has is nobody's to tell."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        other_embeds, share = prompt_embeds.roll(1, -1), torch.full((1, 1, 8, 8), 0.5)
        if mask == "left":
            share[..., :4], share[..., 4:] = 1.0, 0.0
        for _i, t in enumerate(self.scheduler.timesteps):
            (one,) = forward(self, latents, t, prompt_embeds)
            (two,) = forward(self, latents, t, other_embeds)
            (uncond,) = forward(self, latents, t, negative_prompt_embeds)
            noise_pred = uncond + g * (share * one + (1.0 - share) * two - uncond)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    with patched(loop) as pipe, pytest.raises(ValueError, match=r"for cond 2 times in a step"):
        call(pipe)


def test_cond_twice_where_the_result_is_hidden_is_refused():
    def loop(self, prompt_embeds, neg_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)

        def noise(x, t):
            (cond,) = forward(self, x, t, prompt_embeds)
            (uncond,) = forward(self, x, t, neg_embeds)
            return uncond + g * (cond - uncond)

        for _i, t in enumerate(self.scheduler.timesteps):
            latents = stepped(self, noise(latents, t), t, latents)
        return latents

    with patched(loop) as pipe, pytest.raises(ValueError, match=r"for cond 2 times in a step"):
        call(pipe)


def test_uncond_of_another_shape_is_refused():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            (cond,) = forward(self, latents, t, prompt_embeds)
            (uncond,) = forward(self, latents[..., :4], t, negative_prompt_embeds)
            noise_pred = g * cond
            noise_pred[..., :4] += (1.0 - g) * uncond
            latents = stepped(self, noise_pred, t, latents)
        return latents

    with patched(loop) as pipe, pytest.raises(ValueError, match="difference does not fit"):
        call(pipe)


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("apart", [True, False])
def test_one_picture_after_the_other_is_refused(batch, apart):
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            found = []
            for i in range(latents.shape[0]):
                one = latents[i : i + 1]
                both = prompt_embeds[i : i + 1], negative_prompt_embeds[i : i + 1]
                uncond, cond = _both(self, one, t, *both, apart)
                found.append(uncond + g * (cond - uncond))
            latents = stepped(self, torch.cat(found), t, latents)
        return latents

    with (
        patched(loop) as pipe,
        pytest.raises(ValueError, match=r"cannot be told|of 1 of its 2 pictures"),
    ):
        call(pipe, batch=batch)
