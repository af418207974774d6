"""Loops of a user's own: followed with the picture of slow PAG, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from own_loops import call, check, forward, patched, stepped

# ---- predictions of earlier steps ----


def _kept(every, apart):
    """Uncond is run in one of ``every`` steps, and kept."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            if apart or i % every:
                (cond,) = forward(self, latents, t, prompt_embeds)
            if i % every == 0:
                both = negative_prompt_embeds, prompt_embeds
                if apart:
                    (uncond,) = forward(self, latents, t, negative_prompt_embeds)
                else:
                    uncond, cond = forward(self, latents, t, *both)
            noise_pred = uncond + g * (cond - uncond)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    return loop


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("every", "steps"), [(2, 4), (2, 2), (3, 3)])
def test_uncond_of_an_earlier_step_is_refused(every, steps, apart):
    """Also where only the last step has it, behind which no forward comes."""
    with (
        patched(_kept(every, apart)) as pipe,
        pytest.raises(ValueError, match="uses a prediction of an earlier step once more"),
    ):
        call(pipe, steps=steps)


def test_a_difference_of_an_earlier_step_is_followed():
    """cond − uncond of an earlier step, in which PAG's part takes itself away."""

    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            (cond,) = forward(self, latents, t, prompt_embeds)
            if i % 2 == 0:
                (uncond,) = forward(self, latents, t, negative_prompt_embeds)
                direction = cond - uncond
            noise_pred = cond + (g - 1) * direction
            noise_pred = noise_pred + self.extra(cond, latents, t, prompt_embeds)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    check(loop)


def test_momentum_is_followed():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        average = 0.0
        for t in self.scheduler.timesteps:
            uncond, cond = forward(self, latents, t, negative_prompt_embeds, prompt_embeds)
            average = (cond - uncond) + 0.5 * average
            noise_pred = cond + (g - 1) * average
            noise_pred = noise_pred + self.extra(cond, latents, t, prompt_embeds)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    check(loop)


def test_a_multi_step_method_is_followed():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        last = None
        for t in self.scheduler.timesteps:
            uncond, cond = forward(self, latents, t, negative_prompt_embeds, prompt_embeds)
            guided = uncond + g * (cond - uncond)
            guided = guided + self.extra(cond, latents, t, prompt_embeds)
            noise_pred = guided if last is None else 1.5 * guided - 0.5 * last
            last = guided
            latents = latents - 0.1 * noise_pred
        return latents

    check(loop)


# ---- uncond beside the guided prediction ----


def _renoised(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
    """CFG++: noise is put back by uncond's prediction."""
    self.scheduler.set_timesteps(steps)
    kept, ts = self.scheduler.alphas_cumprod, self.scheduler.timesteps
    for i, t in enumerate(ts):
        uncond, cond = forward(self, latents, t, negative_prompt_embeds, prompt_embeds)
        noise_pred = uncond + g * (cond - uncond)
        now, then = kept[t], kept[ts[i + 1]] if i + 1 < len(ts) else torch.tensor(1.0)
        clean = (latents - (1 - now).sqrt() * noise_pred) / now.sqrt()
        latents = then.sqrt() * clean + (1 - then).sqrt() * uncond
    return latents


def _drifting(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
    """In place, and each with a forward of its own."""
    self.scheduler.set_timesteps(steps)
    latents = latents.clone()
    for t in self.scheduler.timesteps:
        (cond,) = forward(self, latents, t, prompt_embeds)
        (uncond,) = forward(self, latents, t, negative_prompt_embeds)
        noise_pred = uncond + g * (cond - uncond)
        latents -= 0.1 * noise_pred - 0.02 * uncond
    return latents


@pytest.mark.parametrize(("loop", "g"), [(_renoised, 0.6), (_renoised, 3.0), (_drifting, 5.0)])
def test_uncond_beside_the_guided_prediction_is_refused(loop, g):
    with patched(loop) as pipe, pytest.raises(ValueError, match="of the prediction of uncond, too"):
        call(pipe, g=g)


# ---- what begins later ----


def test_what_is_done_to_the_guidance_in_later_steps_alone_is_told():
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            uncond, cond = forward(self, latents, t, negative_prompt_embeds, prompt_embeds)
            direction = (cond - uncond) if i < 2 else (cond - uncond).clamp(-0.02, 0.02)
            noise_pred = uncond + g * direction
            latents = stepped(self, noise_pred, t, latents)
        return latents

    with patched(loop) as pipe, pytest.warns(UserWarning, match="does more to the predictions"):
        call(pipe)


def test_reading_waits_for_the_device_in_the_first_step_alone(monkeypatch):
    def loop(self, prompt_embeds, negative_prompt_embeds, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        for t in self.scheduler.timesteps:
            asked.append(0)
            out = self.unet(torch.cat([latents] * 2), t, encoder_hidden_states=text).sample
            uncond, cond = out.chunk(2)
            noise_pred = uncond + g * (cond - uncond)
            latents = stepped(self, noise_pred, t, latents)
        asked.append(0)
        return latents

    asked, cpu = [], torch.Tensor.cpu

    def counted(self, *args, **kwargs):
        asked[-1] += 1
        return cpu(self, *args, **kwargs)

    with patched(loop) as pipe:
        monkeypatch.setattr(torch.Tensor, "cpu", counted)
        call(pipe, steps=5)
    # the first step is looked at when the second begins, the others behind the last
    assert asked[1] and asked[-1]
    assert not asked[0] and not any(asked[2:5])


# ---- orders that nobody sees ----


def _hidden(scale, cond_first=True, alone_at=()):
    def loop(self, ctx, uctx, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            if i in alone_at:
                (cond,) = forward(self, latents, t, ctx)
                noise_pred = cond
            else:
                pair = (ctx, uctx) if cond_first else (uctx, ctx)
                one, two = forward(self, latents, t, *pair)
                cond, uncond = (one, two) if cond_first else (two, one)
                noise_pred = uncond + scale(i, g) * (cond - uncond)
            noise_pred = noise_pred + self.extra(cond, latents, t, ctx)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    return loop


@pytest.mark.parametrize("g", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("cond_first", [True, False])
def test_an_order_that_weights_never_show_is_refused(g, cond_first):
    loop = _hidden(lambda i, g: g, cond_first)
    with patched(loop) as pipe, pytest.raises(ValueError, match="neither by its prompts nor by"):
        call(pipe, g=g)


@pytest.mark.parametrize(
    "loop",
    [
        _hidden(lambda i, g: g, alone_at=(0,)),
        _hidden(lambda i, g: 1.0 + i * (g - 1.0) / 4),
        _hidden(lambda i, g: 1.0 if i < 3 else g),
    ],
)
def test_an_order_that_shows_later_is_looked_for(loop):
    with patched(loop) as pipe, pytest.raises(ValueError, match="in another order than diffusers"):
        call(pipe)


@pytest.mark.parametrize("alone_at", [(0,), (), (1, 3)])
def test_diffusers_order_that_shows_later_is_followed(alone_at):
    check(_hidden(lambda i, g: 1.0 + i * (g - 1.0) / 4, False, alone_at))


def test_an_order_that_changes_is_refused():
    def loop(self, ctx, uctx, latents, steps, g):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            pair = (uctx, ctx) if i < 2 else (ctx, uctx)
            one, two = forward(self, latents, t, *pair)
            uncond, cond = (one, two) if i < 2 else (two, one)
            noise_pred = uncond + g * (cond - uncond)
            latents = stepped(self, noise_pred, t, latents)
        return latents

    with patched(loop) as pipe, pytest.raises(ValueError, match="in another order than diffusers"):
        call(pipe)
