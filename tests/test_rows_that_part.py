"""Rows of branches that are equal in one step and not in the next, and what has no rows at all."""

from __future__ import annotations

import diffusers
import own_loops
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast
from pag_fast.runtime.access import frames

SD, XL, HOST = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionPipeline",
)
LAYERS = {"PixArtSigmaPAGPipeline": "blocks.1"}


class Noisy(diffusers.DDIMScheduler):
    """Tells rows apart from the second step on."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.calls, self.source = 0, torch.Generator().manual_seed(11)

    def scale_model_input(self, sample, timestep=None):
        self.calls += 1
        if self.calls == 1:
            return sample
        return sample + 0.3 * torch.randn(sample.shape, generator=self.source)


def _noisy(module, name):
    pipe = module.build(name)
    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    return pipe


def _picture(module, name, pipe):
    return module.latents(pipe, module.call_kwargs(name, pipe, steps=4))


@pytest.mark.parametrize(
    "name", [SD, XL, "PixArtSigmaPAGPipeline", "StableDiffusionControlNetPAGPipeline"]
)
def test_a_scheduler_tells_rows_apart_in_a_later_step(name):
    pipe = _noisy(tiny, name)
    pipe.set_pag_applied_layers(LAYERS.get(name, "mid"))
    stock = _picture(tiny, name, pipe)
    with pag_fast.patched(pipe), pytest.warns(UserWarning, match="differ in (sample|hidden)"):
        fast = _picture(tiny, name, pipe)
        assert pipe._pag_fast.steps["shared"] == 1
    assert relative(fast, stock) < 1e-5
    with (
        pag_fast.patched(pipe, strict=True),
        pytest.raises(ValueError, match="cond and perturbed rows"),
    ):
        _picture(tiny, name, pipe)


def test_uncond_is_told_apart_in_a_later_step():
    """In front of the first text, uncond and cond run as one row."""
    pipe = _noisy(tiny_hosts, HOST)
    with pag_fast.patched(pipe, "mid", pag_scale=3.0, share_branches=False):
        truth = _picture(tiny_hosts, HOST, pipe)
    with pag_fast.patched(pipe, "mid", pag_scale=3.0, strict=True):
        fast = _picture(tiny_hosts, HOST, pipe)
    assert relative(fast, truth) < 1e-5


def _other_latents(self, cond, uncond, latents, steps, g):
    """Uncond starts from other latents in every step but the first."""
    self.scheduler.set_timesteps(steps)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    for i, t in enumerate(self.scheduler.timesteps):
        rows = torch.cat([latents + 0.5 * noise if i else latents, latents])
        text = torch.cat([uncond, cond])
        u, c = self.unet(rows, t, encoder_hidden_states=text).sample.chunk(2)
        noise_pred = u + g * (c - u) + self.extra(c, latents, t, cond)
        latents = own_loops.stepped(self, noise_pred, t, latents)
    return latents


def _other_timestep(self, cond, uncond, latents, steps, g):
    """Uncond is denoised as if it were half as noisy."""
    self.scheduler.set_timesteps(steps)
    for t in self.scheduler.timesteps:
        times = torch.cat([(t // 2).expand(len(latents)), t.expand(len(latents))])
        rows, text = torch.cat([latents, latents]), torch.cat([uncond, cond])
        u, c = self.unet(rows, times, encoder_hidden_states=text).sample.chunk(2)
        noise_pred = u + g * (c - u) + self.extra(c, latents, t, cond)
        latents = own_loops.stepped(self, noise_pred, t, latents)
    return latents


@pytest.mark.parametrize("loop", [_other_latents, _other_timestep])
def test_a_loop_of_ones_own_tells_uncond_apart(loop):
    own_loops.check(loop, batch=2)


def test_what_diffusers_makes_equal_is_compared_once(monkeypatch):
    """A comparison waits for the device: loops and schedulers of diffusers' need one a call."""
    compared = []
    monkeypatch.setattr(
        torch, "equal", lambda a, b, own=torch.equal: compared.append(1) or own(a, b)
    )
    pipe = tiny.build(SD)
    with pag_fast.patched(pipe, strict=True):
        tiny.latents(pipe, tiny.call_kwargs(SD, pipe, steps=2))
        few = len(compared)
        tiny.latents(pipe, tiny.call_kwargs(SD, pipe, steps=5))
    assert len(compared) == 2 * few


def test_every_scheduler_of_diffusers_scales_rows_alike():
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    # not those of packages that are not installed
    scaling = [kind for kind in kinds if "scale_model_input" in vars(kind)]
    assert len(scaling) > 20
    assert all(frames._is_diffusers(x.scale_model_input.__globals__["__name__"]) for x in scaling)
    assert not frames._is_diffusers(Noisy.scale_model_input.__globals__["__name__"])


def _sparse():
    """A pipeline whose control video has one row, which the net hands to all of the batch."""
    torch.manual_seed(0)
    down = ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion")
    net = diffusers.SparseControlNetModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=down,
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        conditioning_embedding_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        use_simplified_condition_embedding=False,
        conditioning_channels=3,
    )
    unet = tiny.randomise(tiny.motion_unet())
    tiny.randomise(net)
    with torch.no_grad():
        for parameter in net.controlnet_cond_embedding.parameters():
            parameter.normal_(std=0.5)
    pipe = diffusers.AnimateDiffSparseControlNetPipeline(
        vae=tiny.randomise(tiny.vae()),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        motion_adapter=None,
        controlnet=net,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _video(pipe, num_frames, **more):
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, 5, 12, generator=source) for _ in range(2)]
    picture = torch.rand(1, 3, 16, 16, generator=source)
    return pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        conditioning_frames=picture,
        controlnet_frame_indices=[num_frames - 1],
        num_frames=num_frames,
        height=16,
        width=16,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).frames


@pytest.mark.parametrize("num_frames", [3, 4])
def test_a_control_video_with_one_row_for_all(num_frames):
    pipe = _sparse()
    stock = _video(pipe, num_frames)
    assert relative(_video(pipe, num_frames, controlnet_conditioning_scale=0.0), stock) > 1e-3
    with pag_fast.patched(pipe, "mid", pag_scale=1e-30, strict=True):
        fast = _video(pipe, num_frames)
    assert relative(fast, stock) < 1e-5


def _one_control_picture(self, cond, uncond, latents, steps, g):
    self.scheduler.set_timesteps(steps)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for t in self.scheduler.timesteps:
        rows, text = torch.cat([latents, latents]), torch.cat([uncond, cond])
        down, mid = self.controlnet(
            rows, t, encoder_hidden_states=text, controlnet_cond=picture, return_dict=False
        )
        residuals = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
        out = self.unet(rows, t, encoder_hidden_states=text, **residuals).sample
        u, c = out.chunk(2)
        noise_pred = u + g * (c - u)
        latents = own_loops.stepped(self, noise_pred, t, latents)
    return latents


def test_a_control_picture_that_the_net_hands_to_all_rows():
    name = "StableDiffusionControlNetPipeline"
    pipe = tiny_hosts.build(name)
    pipe.__class__ = type("Own", (type(pipe),), {"__call__": torch.no_grad()(_one_control_picture)})
    pipe.is_truth = False
    stock = own_loops.call(pipe)
    with pag_fast.patched(pipe, "mid", pag_scale=1e-30, strict=True):
        fast = own_loops.call(pipe)
    assert relative(fast, stock) < 1e-5


def _as_an_adapter(self, cond, uncond, latents, steps, g):
    """Residuals without one for the middle are an adapter's."""
    self.scheduler.set_timesteps(steps)
    source = torch.Generator().manual_seed(5)
    shapes = [(8, 8, 8), (16, 4, 4), (16, 2, 2)]
    residuals = [0.3 * torch.randn(1, *shape, generator=source) for shape in shapes]
    for t in self.scheduler.timesteps:
        rows, text = torch.cat([latents, latents]), torch.cat([uncond, cond])
        both = [torch.cat([x, x]) for x in residuals]
        out = self.unet(rows, t, encoder_hidden_states=text, down_block_additional_residuals=both)
        u, c = out.sample.chunk(2)
        noise_pred = u + g * (c - u)
        latents = own_loops.stepped(self, noise_pred, t, latents)
    return latents


@pytest.mark.parametrize("layer", ["mid", "down_blocks.0", "up_blocks.2.attentions.1"])
@pytest.mark.filterwarnings("ignore:Passing intrablock:FutureWarning")
def test_residuals_of_an_adapter_in_the_older_argument(layer):
    with own_loops.running(_as_an_adapter) as pipe:
        stock = own_loops.call(pipe)
        with pag_fast.patched(pipe, layer, pag_scale=1e-30, strict=True):
            fast = own_loops.call(pipe)
    assert relative(fast, stock) < 1e-5
