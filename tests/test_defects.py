"""Defects of the host, by the numbers of the table in docs/defects.md: fixed, kept or refused."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.pipelines.pag.pipeline_pag_sd import rescale_noise_cfg
from numerics import relative
from slow import FixedJoint, FixedSana, separate_forwards
from tiny import PIPELINES, SIZE, build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve

CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])


def _patched(pipe, name, layers=None, **kwargs):
    with pag_fast.patched(pipe, layers):
        return latents(pipe, call_kwargs(name, pipe, **kwargs))


@CFG
def test_b1_b2_sd35_dual_attention_and_qk_norm(cfg):
    name = "StableDiffusion3PAGPipeline"
    pipe = build(name, sd35=True)
    with pytest.raises(AttributeError):
        latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    patched = _patched(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(["blocks.1"], (FixedJoint(3), FixedJoint(2)))
    assert relative(patched, latents(pipe, call_kwargs(name, pipe, cfg=cfg))) < 1e-5


@CFG
def test_b2_qk_norm_outside_dual_blocks(cfg):
    """Stock does not crash there; it leaves the norms out, for uncond and cond as well."""
    name, layer = "StableDiffusion3PAGPipeline", r"blocks\.4\."
    pipe = build(name, sd35=True, pag_applied_layers=layer)
    stock = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    patched = _patched(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(layer, (FixedJoint(3), FixedJoint(2)))
    fixed = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(patched, fixed) < 1e-5
    assert relative(stock, fixed) > 1e-4


# B3, processors that leak after an exception: test_faults.py


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
    assert relative(_patched(pipe, name, guess_mode=True, **options), expected) < 1e-5


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
    assert relative(_patched(pipe, name, guidance_rescale=0.7), stock) < 1e-5
    assert relative(_patched(pipe, name), stock) > 1e-3


def test_b5_inpaint_with_guidance_rescale():
    name = "StableDiffusionPAGInpaintPipeline"
    pipe = build(name)
    with pytest.raises(UnboundLocalError):
        latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.7))
    patched = _patched(pipe, name, guidance_rescale=0.7)

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
    patched = _patched(pipe, name, batch=2, steps=4, pag_adaptive_scale=adaptive)
    pipe._get_pag_scale = lambda t: PAGMixin._get_pag_scale(pipe, t.flatten()[0])
    stock = latents(pipe, call_kwargs(name, pipe, batch=2, steps=4, pag_adaptive_scale=adaptive))
    assert relative(patched, stock) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_b8_hunyuan_with_size_conditioning_without_cfg(batch):
    name = "HunyuanDiTPAGPipeline"
    pipe = build(name, meta_size=True)
    with pytest.raises(RuntimeError):
        latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=False))
    patched = _patched(pipe, name, batch=batch, cfg=False)
    forward = pipe.transformer.forward

    def mended(hidden_states, *args, **kwargs):
        for key in ("image_meta_size", "style"):
            kwargs[key] = kwargs[key][: hidden_states.shape[0]]
        return forward(hidden_states, *args, **kwargs)

    pipe.transformer.forward = mended
    assert relative(patched, latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=False))) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_hunyuan_with_size_conditioning(batch):
    name = "HunyuanDiTPAGPipeline"
    pipe = build(name, meta_size=True)
    stock = latents(pipe, call_kwargs(name, pipe, batch=batch))
    assert relative(_patched(pipe, name, batch=batch), stock) < 1e-5


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


@pytest.mark.parametrize(
    "name", ["StableDiffusion3PAGPipeline", "HunyuanDiTPAGPipeline", "SanaPAGPipeline"]
)
def test_b10_set_pag_applied_layers_keeps_the_family(name):
    chosen = PIPELINES[name].layers["middle"]
    pipe = build(name, pag_applied_layers=chosen)
    stock = latents(pipe, call_kwargs(name, pipe))
    pipe = pag_fast.patch(build(name))
    pipe.set_pag_applied_layers(chosen)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    pag_fast.unpatch(pipe)
    assert pipe.pag_applied_layers == chosen
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) == 0.0


def test_b11_fake_integral_match_is_kept_unless_exact():
    model = build("PixArtSigmaPAGPipeline", num_layers=12).transformer
    assert len(resolve(model, "blocks.1")) == 3  # 1, 10 and 11
    assert list(resolve(model, "blocks.1", exact=True)) == ["transformer_blocks.1.attn1"]
    pipe = pag_fast.patch(build("PixArtSigmaPAGPipeline", num_layers=12), exact_layers=True)
    assert len(pag_fast.explain(pipe, flops=False).layers) == 1


def test_b12_guidance_embedding_with_several_samples():
    """LCM-style UNets: stock gives the guidance embedding of B samples to 2 B rows."""
    name = "StableDiffusionPAGPipeline"
    pipe = build(name, time_cond_proj_dim=8)
    noise = torch.randn(2, 4, 8, 8)
    kwargs = call_kwargs(name, pipe, batch=2, latents=noise)
    with pytest.raises(RuntimeError):
        latents(pipe, kwargs)
    one_by_one = []
    for i in range(2):
        single = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        one_by_one.append(latents(pipe, single))
    with pag_fast.patched(pipe):
        assert relative(latents(pipe, kwargs), torch.cat(one_by_one)) < 1e-5


def test_b13_kolors_ip_adapter_fails_as_in_stock():
    """Kept: what is missing is inside the pipeline's own code."""
    name = "KolorsPAGPipeline"
    pipe = build(name)
    pipe.prepare_ip_adapter_image_embeds = lambda *args: [torch.randn(2, 1, 4, 12)]
    kwargs = {"ip_adapter_image": torch.rand(1, 3, SIZE, SIZE)}
    for run in (latents, lambda pipe, kw: latents(pag_fast.patch(pipe), kw)):
        with pytest.raises(TypeError, match="NoneType"):
            run(pipe, call_kwargs(name, pipe, **kwargs))


def _with_free_noise():
    pipe = build("AnimateDiffPAGPipeline")
    # only its longest sequence is asked for; the motion modules are in the UNet
    pipe.motion_adapter = diffusers.MotionAdapter(
        block_out_channels=(8,),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    pipe.enable_free_noise(context_length=2, context_stride=1)
    return pipe


def test_b14_free_noise():
    name = "AnimateDiffPAGPipeline"
    pipe = _with_free_noise()
    stock = latents(pipe, call_kwargs(name, pipe, num_frames=4))
    assert relative(_patched(pipe, name, num_frames=4), stock) < 1e-5


def test_b14_split_inference_is_refused(snapshot):
    name = "AnimateDiffPAGPipeline"
    pipe = _with_free_noise()
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=2)
    pag_fast.patch(pipe, ["attn1"])
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="split inference"):
        latents(pipe, call_kwargs(name, pipe, num_frames=4))
    assert snapshot(pipe) == before


def test_b15_from_pipe_forgets_layers():
    """Kept: ``from_pipe`` belongs to the class that is made. The layers can be handed on."""
    pipe = pag_fast.patch(build("StableDiffusionXLPAGPipeline"), ["up_blocks.0"])
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is diffusers.StableDiffusionXLPAGImg2ImgPipeline
    assert other.pag_applied_layers == ["mid"]
    assert not hasattr(other, "_pag_fast")
    pag_fast.patch(other, pipe.pag_applied_layers)
    assert other.pag_applied_layers == ["up_blocks.0"]


@CFG
def test_b16_sana_qk_norm(cfg):
    name, layer = "SanaPAGPipeline", r"transformer_blocks\.2\."
    pipe = build(name, qk_norm="rms_norm_across_heads", pag_applied_layers=layer)
    stock = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    patched = _patched(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(layer, (FixedSana(3), FixedSana(2)))
    fixed = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(patched, fixed) < 1e-5
    assert relative(stock, fixed) > 1e-4


# B17, names from the documentation that match nothing: test_layers.py


def test_b18_inpaint_from_image_latents():
    name = "StableDiffusionXLPAGInpaintPipeline"
    pipe = build(name)
    image = torch.randn(1, 4, 8, 8)
    with pytest.raises(AttributeError):
        latents(pipe, call_kwargs(name, pipe, image=image))
    patched = _patched(pipe, name, image=image)
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
    assert relative(_patched(pipe, name), stock) < 1e-5


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
