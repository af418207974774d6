"""Defects of pipelines' own loops, by the numbers of docs/defects.md: fixed, kept or refused."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.pipelines.pag.pipeline_pag_sd import rescale_noise_cfg
from numerics import relative
from parity import patched_build
from slow import separate_forwards
from tiny import build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve

CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])


def _guess_mode_reference(pipe, kwargs, cfg, pag):
    """Stock without guess mode, its ControlNet replaced by what guess mode means."""
    net, slabs = pipe.controlnet, 1 + cfg + pag
    stock_forward = net.forward

    def forward(sample, timestep, **call):
        rows = sample.shape[0] // slabs
        cond = slice(rows, 2 * rows) if cfg else slice(0, rows)
        call["encoder_hidden_states"] = call["encoder_hidden_states"][cond]
        call["controlnet_cond"] = call["controlnet_cond"][cond]
        down, mid = stock_forward(sample[cond], timestep, **{**call, "guess_mode": True})
        before, after = int(cfg), 1 + int(pag)
        return [torch.cat([0 * r] * before + [r] * after) for r in down], torch.cat(
            [0 * mid] * before + [mid] * after
        )

    net.forward = forward
    try:
        return latents(pipe, kwargs)
    finally:
        del net.forward


@pytest.mark.parametrize("pag_scale", [3.0, 0.0])
@pytest.mark.parametrize("batch", [1, 2])
@CFG
def test_b4_guess_mode(cfg, batch, pag_scale):
    name = "StableDiffusionControlNetPAGPipeline"
    pipe = build(name)
    options = {"batch": batch, "cfg": cfg, "pag_scale": pag_scale}
    expected = _guess_mode_reference(pipe, call_kwargs(name, pipe, **options), cfg, pag_scale > 0)
    if cfg:
        with pytest.raises(RuntimeError):
            latents(pipe, call_kwargs(name, pipe, guess_mode=True, **options))
    assert relative(patched_build(pipe, name, guess_mode=True, **options), expected) < 1e-5


_RESCALING = [
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "HunyuanDiTPAGPipeline",
]


@pytest.mark.parametrize("name", _RESCALING)
def test_guidance_rescale_equals_stock(name):
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.7))
    assert relative(patched_build(pipe, name, guidance_rescale=0.7), stock) < 1e-5
    assert relative(patched_build(pipe, name), stock) > 1e-3


def test_b5_inpaint_with_guidance_rescale():
    name = "StableDiffusionPAGInpaintPipeline"
    pipe = build(name)
    with pytest.raises(UnboundLocalError):
        latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.7))
    patched = patched_build(pipe, name, guidance_rescale=0.7)

    def combine(noise, cfg, g, t):
        out, cond = PAGMixin._apply_perturbed_attention_guidance(pipe, noise, cfg, g, t, True)
        return rescale_noise_cfg(out, cond, 0.7)

    pipe._apply_perturbed_attention_guidance = combine
    assert relative(patched, latents(pipe, call_kwargs(name, pipe))) < 1e-5


def test_callbacks_see_the_real_guidance_rescale():
    name, seen = "StableDiffusionPAGPipeline", []
    pipe = pag_fast.patch(build(name))

    def callback(pipe, i, t, tensors):
        seen.append(pipe.guidance_rescale)
        return tensors

    latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.7, callback_on_step_end=callback))
    assert seen == [0.7, 0.7]


_EARLY = ["StableDiffusionXLPAGInpaintPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline"]


@pytest.mark.parametrize("name", _EARLY)
def test_b6_early_return(name, snapshot, monkeypatch):
    pipe = build(name)
    before = snapshot(pipe)
    pipe(**call_kwargs(name, pipe, return_dict=False))
    assert snapshot(pipe) != before, "stock no longer leaks: the table can drop B6"
    pipe = build(name)
    before = snapshot(pipe)
    freed = []
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "maybe_free_model_hooks", lambda self: freed.append(self)
    )
    pag_fast.patch(pipe)
    (image,) = pipe(**call_kwargs(name, pipe, return_dict=False))
    assert image.shape == (1, 4, 8, 8)
    assert freed == [pipe]
    assert snapshot(pag_fast.unpatch(pipe)) == before


@pytest.mark.parametrize("adaptive", [0.002, 0.004, 0.02])
def test_b7_pixart_with_adaptive_scale(adaptive):
    name = "PixArtSigmaPAGPipeline"
    pipe = build(name)
    with pytest.raises(RuntimeError, match="ambiguous"):
        latents(pipe, call_kwargs(name, pipe, batch=2, pag_adaptive_scale=adaptive))
    patched = patched_build(pipe, name, batch=2, steps=4, pag_adaptive_scale=adaptive)
    pipe._get_pag_scale = lambda t: PAGMixin._get_pag_scale(pipe, t.flatten()[0])
    stock = latents(pipe, call_kwargs(name, pipe, batch=2, steps=4, pag_adaptive_scale=adaptive))
    assert relative(patched, stock) < 1e-5


_SIZES = {"negative_original_size": (64, 64), "negative_target_size": (32, 32)}


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLPAGPipeline", "StableDiffusionXLControlNetPAGPipeline", "KolorsPAGPipeline"],
)
def test_b9_interleaved_time_ids(name):
    """Stock hands cond and perturbed different sizes: run apart, with a warning, as stock does."""
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe, batch=2, **_SIZES))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match=r"differ in added_cond_kwargs\.time_ids"):
        patched = latents(pipe, call_kwargs(name, pipe, batch=2, **_SIZES))
    assert relative(patched, stock) < 1e-5
    assert pipe._pag_fast.steps["not shared"] == 2
    assert len(pag_fast.explain(pipe, flops=False).fallbacks) >= 1
    # the same sizes with one image are in order
    latents(pipe, call_kwargs(name, pipe, **_SIZES))
    assert pipe._pag_fast.steps["shared"] == 2


def test_b9_strict_raises(snapshot):
    name = "StableDiffusionXLPAGPipeline"
    pipe = pag_fast.patch(build(name), strict=True)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="time_ids"):
        latents(pipe, call_kwargs(name, pipe, batch=2, **_SIZES))
    assert snapshot(pipe) == before


def test_b18_inpaint_from_image_latents():
    name = "StableDiffusionXLPAGInpaintPipeline"
    pipe = build(name)
    image = torch.randn(1, 4, 8, 8)
    with pytest.raises(AttributeError):
        latents(pipe, call_kwargs(name, pipe, image=image))
    patched = patched_build(pipe, name, image=image)
    # the masked image plays no part in a 4-channel UNet: give stock any
    extra = {"image": image, "masked_image_latents": torch.zeros(1, 4, 8, 8)}
    assert relative(patched, latents(pipe, call_kwargs(name, pipe, **extra))) < 1e-5


def test_b19_watermark_on_latents_is_kept():
    class Watermark:
        def apply_watermark(self, images):
            return images + 1

    name = "StableDiffusionXLPAGImg2ImgPipeline"
    pipe = build(name)
    plain = latents(pipe, call_kwargs(name, pipe))
    pipe.watermark = Watermark()
    stock = latents(pipe, call_kwargs(name, pipe))
    assert relative(stock, plain) > 1e-2
    assert relative(patched_build(pipe, name), stock) < 1e-5


@pytest.mark.parametrize("keep", [1, 2], ids=["cond", "cond-perturbed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_b20_callback_that_turns_cfg_off(batch, keep):
    name, switch = "StableDiffusionPAGPipeline", 1
    pipe = build(name)

    def callback(pipe, i, t, tensors):
        if i == switch:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"][-keep * batch :]}
        return {}

    noise = torch.randn(batch, 4, 8, 8)
    extra = {
        "latents": noise,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    kwargs = call_kwargs(name, pipe, batch=batch, steps=4, **extra)
    if keep == 1 or batch == 1:
        with pytest.raises((ValueError, RuntimeError)):
            latents(pipe, kwargs)
    with pag_fast.patched(pipe):
        patched = latents(pipe, kwargs)
    expected = separate_forwards(
        pipe,
        noise,
        kwargs["prompt_embeds"],
        kwargs["negative_prompt_embeds"],
        list(resolve(pipe.unet, "mid").values()),
        steps=4,
        pag_scale=3.0,
        guidance_scale=lambda step: 5.0 if step <= switch else 0.0,
    )
    assert relative(patched, expected) < 1e-5


def test_b20_rows_that_fit_nothing():
    name = "StableDiffusionPAGPipeline"
    pipe = pag_fast.patch(build(name))

    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": torch.cat([tensors["prompt_embeds"]] * 2)[:10]}

    kwargs = call_kwargs(
        name,
        pipe,
        batch=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    with pytest.raises(ValueError, match="10 rows, which is no whole number of branches of 2"):
        latents(pipe, kwargs)


def test_callback_that_replaces_embeddings_is_noticed():
    """New embeddings whose cond and perturbed rows differ: checked again, run apart from there."""
    name = "StableDiffusionPAGPipeline"
    pipe = build(name)

    def callback(pipe, i, t, tensors):
        embeds = tensors["prompt_embeds"].clone()
        embeds[-1] += 1
        return {"prompt_embeds": embeds} if i == 0 else {}

    extra = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    stock = latents(pipe, call_kwargs(name, pipe, steps=3, **extra))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="differ in encoder_hidden_states"):
        patched = latents(pipe, call_kwargs(name, pipe, steps=3, **extra))
    assert relative(patched, stock) < 1e-5
    assert dict(pipe._pag_fast.steps) == {"shared": 1, "not shared": 2}


def test_callback_that_replaces_the_mask_is_noticed():
    name = "StableDiffusionXLPAGInpaintPipeline"
    pipe = build(name, in_channels=9)

    def callback(pipe, i, t, tensors):
        mask = tensors["mask"].clone()
        mask[-1] = 1 - mask[-1]
        return {"mask": mask} if i == 0 else {}

    extra = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["mask"],
    }
    stock = latents(pipe, call_kwargs(name, pipe, steps=3, **extra))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="differ in sample"):
        patched = latents(pipe, call_kwargs(name, pipe, steps=3, **extra))
    assert relative(patched, stock) < 1e-5
