"""Defects of models and layers, by the numbers of docs/defects.md: fixed, kept or refused."""

from __future__ import annotations

import diffusers
import pytest
import torch
from numerics import relative
from parity import patched_build
from slow import FixedJoint, FixedSana
from tiny import PIPELINES, SIZE, build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve

CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])


@CFG
def test_b1_b2_sd35_dual_attention_and_qk_norm(cfg):
    name = "StableDiffusion3PAGPipeline"
    pipe = build(name, sd35=True)
    with pytest.raises(AttributeError):
        latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    patched = patched_build(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(["blocks.1"], (FixedJoint(3), FixedJoint(2)))
    assert relative(patched, latents(pipe, call_kwargs(name, pipe, cfg=cfg))) < 1e-5


@CFG
def test_b2_qk_norm_outside_dual_blocks(cfg):
    """Stock does not crash there; it leaves the norms out, for uncond and cond as well."""
    name, layer = "StableDiffusion3PAGPipeline", r"blocks\.4\."
    pipe = build(name, sd35=True, pag_applied_layers=layer)
    stock = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    patched = patched_build(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(layer, (FixedJoint(3), FixedJoint(2)))
    fixed = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(patched, fixed) < 1e-5
    assert relative(stock, fixed) > 1e-4


# B3, processors that leak after an exception: test_faults.py


@pytest.mark.parametrize("batch", [1, 2])
def test_b8_hunyuan_with_size_conditioning_without_cfg(batch):
    name = "HunyuanDiTPAGPipeline"
    pipe = build(name, meta_size=True)
    with pytest.raises(RuntimeError):
        latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=False))
    patched = patched_build(pipe, name, batch=batch, cfg=False)
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
    assert relative(patched_build(pipe, name, batch=batch), stock) < 1e-5


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
    assert relative(patched_build(pipe, name, num_frames=4), stock) < 1e-5


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
    patched = patched_build(pipe, name, cfg=cfg)
    pipe.set_pag_applied_layers(layer, (FixedSana(3), FixedSana(2)))
    fixed = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    assert relative(patched, fixed) < 1e-5
    assert relative(stock, fixed) > 1e-4


# B17, names from the documentation that match nothing: test_layers.py
