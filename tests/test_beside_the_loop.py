"""Forwards beside a call's denoising loop, loops of a user's own, calls without steps."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from numerics import relative

import pag_fast
from pag_fast.models.layer_names import resolve, self_attentions

SD, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
HOST = "StableDiffusionPipeline"


def _as(pipe, make):
    pipe.__class__ = make(type(pipe))
    return pipe


# ---- in front of the loop and behind it ----


def _scored(rows):
    """A class that runs its denoiser once more, behind the loop."""

    def make(base):
        class Scored(base):
            def __call__(self, *args, **kwargs):
                out = super().__call__(*args, **kwargs)
                with torch.no_grad():
                    x, text = out.images.repeat(rows, 1, 1, 1), kwargs["prompt_embeds"]
                    text = text.repeat(rows, 1, 1)
                    self.score = self.unet(x, 1, encoder_hidden_states=text).sample
                return out

        return Scored

    return make


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("name", [SD, HOST])
def test_a_forward_behind_the_call_of_the_base(name, rows):
    module = tiny if name == SD else tiny_hosts
    pipe = _as(module.build(name), _scored(rows))
    plain = module.latents(pipe, module.call_kwargs(name, pipe))
    stock = pipe.score
    with pag_fast.patched(pipe, "mid", **({} if name == SD else {"pag_scale": 0.0})):
        found = module.latents(pipe, module.call_kwargs(name, pipe))
        assert pipe.score.shape == stock.shape
        if name == HOST:
            assert torch.equal(found, plain) and torch.equal(pipe.score, stock)
            # of other latents: the forward is as it would be without us
            module.latents(pipe, module.call_kwargs(name, pipe) | {"pag_scale": 3.0})
            assert pipe.score.shape == stock.shape
        else:
            assert relative(pipe.score, stock) < 1e-5


def test_two_calls_of_the_base_with_other_batches():
    def make(base):
        class Twice(base):
            def __call__(self, *args, **kwargs):
                self.first = super().__call__(**tiny.call_kwargs(SD, self, batch=2)).images
                return super().__call__(*args, **kwargs)

        return Twice

    pipe = _as(tiny.build(SD), make)
    stock, first = tiny.latents(pipe, tiny.call_kwargs(SD, pipe)), pipe.first
    with pag_fast.patched(pipe, strict=True):
        assert relative(tiny.latents(pipe, tiny.call_kwargs(SD, pipe)), stock) < 1e-5
        assert relative(pipe.first, first) < 1e-5


def _inverted(rows, timestep):
    """A class that finds its latents by the denoiser, in front of the loop."""

    def make(base):
        class Inverted(base):
            def prepare_latents(self, *args, **kwargs):
                x = super().prepare_latents(*args, **kwargs)
                text = torch.randn(rows, 5, 12, generator=torch.Generator().manual_seed(9))
                with torch.no_grad():
                    out = self.unet(x.repeat(rows, 1, 1, 1), timestep, encoder_hidden_states=text)
                self.seen = x + 0.1 * out.sample.mean(0, keepdim=True)
                return self.seen

        return Inverted

    return make


@pytest.mark.parametrize("timestep", [400, torch.tensor(400)], ids=["int", "tensor"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_forward_in_front_of_the_loop(rows, timestep):
    """A pipeline without PAG leaves it as diffusers' PAG pipeline does."""
    make = _inverted(rows, timestep)
    pipe = _as(tiny.build(SD), make)
    stock, seen = tiny.latents(pipe, tiny.call_kwargs(SD, pipe)), pipe.seen
    host = _as(tiny_hosts.build(HOST), make)
    kwargs = tiny_hosts.call_kwargs(HOST, host)
    with pag_fast.patched(host, pipe.pag_applied_layers, pag_scale=3.0, strict=True):
        patched = tiny_hosts.latents(host, kwargs)
    assert torch.equal(host.seen, seen)
    assert relative(patched, stock) < 1e-5


# ---- loops of a user's own ----


def _own(order, number, name="x"):
    """A class whose loop runs the branches of ``order``: uncond and cond."""

    def make(base):
        class Own(base):
            @torch.no_grad()
            def __call__(self, prompt_embeds, negative_prompt_embeds, generator, **_):
                self.scheduler.set_timesteps(3)
                x = torch.randn(len(prompt_embeds), 4, 8, 8, generator=generator)
                parts = {"u": negative_prompt_embeds, "c": prompt_embeds}
                text = torch.cat([parts[branch] for branch in order])
                for t in self.scheduler.timesteps:
                    both = torch.cat([x] * len(order))
                    noise = self.unet(both, number(t), encoder_hidden_states=text).sample
                    by = dict(zip(order, noise.chunk(len(order)), strict=True))
                    total = by["c"] + 4.0 * (by["c"] - by["u"]) if "u" in by else by["c"]
                    x = self.scheduler.step(total, t, x).prev_sample
                return StableDiffusionPipelineOutput(images=x, nsfw_content_detected=None)

        return Own

    return make


def _by_hand(pipe, order, batch):
    """The same loop, with PAG from a forward of its own."""
    own, attentions = pipe.unet.forward, list(resolve(pipe.unet, ["mid"]).values())
    at = order.index("c")

    def forward(x, t, encoder_hidden_states=None, **rest):
        out = own(x, t, encoder_hidden_states=encoder_hidden_states, **rest).sample
        rows = slice(at * batch, (at + 1) * batch)
        with tiny_hosts.perturbing(attentions, "", [0], 0):
            perturbed = own(x[rows], t, encoder_hidden_states=encoder_hidden_states[rows]).sample
        difference = 3.0 * (out[rows] - perturbed)
        return type("Out", (), {"sample": out + difference.repeat(len(order), 1, 1, 1)})

    pipe.unet.forward = forward
    try:
        return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe, batch=batch))
    finally:
        del pipe.unet.forward


@pytest.mark.parametrize("number", [lambda t: t, int, float], ids=["tensor", "int", "float"])
@pytest.mark.parametrize(("order", "batch"), [("uc", 1), ("cu", 1), ("c", 1), ("uc", 2), ("c", 2)])
def test_branches_of_a_loop_in_any_order(order, batch, number):
    """Whose rows are cond's shows in the loop's prompts, or in what it makes of predictions."""
    truth = _by_hand(_as(tiny_hosts.build(HOST), _own(order, number)), order, batch)
    pipe = _as(tiny_hosts.build(HOST), _own(order, number))
    with pag_fast.patched(pipe, "mid", pag_scale=3.0, strict=True):
        found = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe, batch=batch))
    assert relative(found, truth) < 1e-5


@pytest.mark.parametrize(
    ("order", "batch", "why"),
    [("ucc", 1, "runs 3 branches in one batch"), ("ucu", 2, "3 branches")],
)
def test_what_cannot_be_told_is_refused(order, batch, why, snapshot):
    pipe = _as(tiny_hosts.build(HOST), _own(order, int))
    before = snapshot(pipe)
    told = "runs a loop of its own, and runs 3 branches in one batch"
    with pag_fast.patched(pipe, "mid", pag_scale=3.0), pytest.raises(ValueError, match=told):
        tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe, batch=batch))
    assert snapshot(pipe) == before


# ---- calls without steps, too few rows ----


@pytest.mark.parametrize(
    "name", ["StableDiffusionPAGImg2ImgPipeline", "StableDiffusion3PAGImg2ImgPipeline"]
)
def test_a_strength_of_nothing(name):
    pipe = tiny.build(name)

    def run():
        return tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=4) | {"strength": 0.0})

    stock = run()
    with pag_fast.patched(pipe, strict=True):
        assert torch.equal(run(), stock)


def test_fewer_rows_than_branches():
    """One picture for two prompts: stock raises, too, without saying why."""
    name = "StableDiffusion3PAGImg2ImgPipeline"
    pipe = pag_fast.patch(tiny.build(name))
    kwargs = tiny.call_kwargs(name, pipe) | {"num_images_per_prompt": 2, "strength": 0.8}
    with pytest.raises(ValueError, match="2 rows, fewer than the 3 branches"):
        tiny.latents(pipe, kwargs)


# ---- names that end in a number ----


@pytest.mark.parametrize("layer", ["up_blocks.1", "up_blocks.1.attentions.", "down_blocks.1"])
def test_the_number_of_a_block_is_not_an_attentions(layer):
    """Diffusers leaves out the attention whose name ends in the number that the layer ends in."""
    blocks = ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    ups = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")
    pipe = tiny.build(SD, down_block_types=blocks, up_block_types=ups)
    pipe._set_pag_attn_processor([layer], True)
    stock = {name.removesuffix(".processor") for name in pipe.pag_attn_processors}
    assert set(resolve(pipe.unet, [layer])) == stock
    named = next(name for name in self_attentions(pipe.unet) if name.startswith(layer))
    assert list(resolve(pipe.unet, [named])) == [named]
