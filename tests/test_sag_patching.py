"""A SAG pipeline is patched, copied, explained and unpatched, or refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from numerics import relative
from tiny_sag import ATTENTION, add_lora, build_sag, sag_latents, sag_snapshot

import pag_fast


def test_unpatch_leaves_what_was_there():
    pipe = build_sag()
    before, weights = sag_snapshot(pipe), copy.deepcopy(pipe.unet.state_dict())
    stock = sag_latents(pipe)
    assert pag_fast.patch(pipe) is pipe
    assert isinstance(pipe, diffusers.StableDiffusionSAGPipeline)
    pag_fast.patch(pipe, cache_conditioning=False)
    assert not pipe._pag_fast.config.cache_conditioning
    sag_latents(pipe)
    between = sag_snapshot(pipe)
    # the entry stands in front of the UNet as a whole, from patch to unpatch
    patched = "class", "attributes", ""
    assert {**between, **{k: before[k] for k in patched}} == before
    assert pag_fast.unpatch(pipe) is pipe
    assert sag_snapshot(pipe) == before
    assert all(torch.equal(weights[k], v) for k, v in pipe.unet.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert len(storages) == len(list(pipe.unet.parameters()))
    assert torch.equal(sag_latents(pipe), stock)


def test_adapters_loaded_between_calls():
    """Weights that were joined before part again."""
    pipe = pag_fast.patch(build_sag())
    sag_latents(pipe)
    add_lora(pipe)
    patched = sag_latents(pipe)
    pag_fast.unpatch(pipe)
    storages = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert len(storages) == len(list(pipe.unet.parameters()))
    assert relative(patched, sag_latents(pipe)) < 1e-5


def test_patched_and_deep_copies():
    pipe = build_sag()
    with pag_fast.patched(pipe) as inner:
        assert inner is pipe
        outer = pipe._pag_fast
        with pag_fast.patched(pipe, fewer_launches=False):
            assert pipe._pag_fast is not outer
        assert pipe._pag_fast is outer
        expected = sag_latents(pipe)
        twin = copy.deepcopy(pipe)
        assert torch.equal(sag_latents(twin), expected)
    assert type(pipe) is diffusers.StableDiffusionSAGPipeline
    assert not hasattr(pipe, "pag_applied_layers")


def test_methods_called_by_hand_are_stocks():
    pipe = pag_fast.patch(build_sag())
    pipe.scheduler.set_timesteps(2)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    t = pipe.scheduler.timesteps[0]
    original = pipe.pred_x0(sample, output, t)
    noise = pipe.pred_epsilon(sample, output, t)
    attention_map = torch.rand(2, 4, 4)
    out = pipe.sag_masking(original, attention_map, (2, 2), t, noise)
    pag_fast.unpatch(pipe)
    assert torch.equal(original, pipe.pred_x0(sample, output, t))
    assert torch.equal(out, pipe.sag_masking(original, attention_map, (2, 2), t, noise))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["mid"]}, "perturbs no layers"),
        ({"compile": True}, "leave out compile"),
        ({"speed": 11}, "Unknown option 'speed'"),
    ],
)
def test_refusals(options, message):
    pipe = pag_fast.patch(build_sag())
    state = pipe._pag_fast
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **options)
    assert pipe._pag_fast is state


def test_a_pipeline_with_methods_of_its_own_is_refused():
    class Mine(diffusers.StableDiffusionSAGPipeline):
        def pred_x0(self, sample, model_output, timestep):
            return sample

    pipe = build_sag()
    pipe.__class__ = Mine
    with pytest.raises(ValueError, match="Mine has its own pred_x0"):
        pag_fast.patch(pipe)
    assert type(pipe) is Mine


def test_a_unet_without_attention_in_the_middle_is_refused():
    pipe = build_sag(mid_block_type="UNetMidBlock2D")
    with pytest.raises(ValueError, match="no transformer in its middle block"):
        pag_fast.patch(pipe)


def test_a_compiled_unet_runs_as_it_is():
    pipe = build_sag()
    stock = sag_latents(pipe)
    pag_fast.patch(pipe)
    # looks compiled, costs nothing
    pipe.unet._compiled_call_impl = pipe.unet._call_impl
    with pytest.warns(UserWarning, match="the UNet is compiled"):
        patched = sag_latents(pipe)
    assert relative(patched, stock) < 1e-5
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    with pytest.raises(ValueError, match="not compiled, or without"):
        sag_latents(pipe, **embeds)
    pag_fast.patch(pipe, strict=True)
    with pytest.raises(ValueError, match="strict=True"):
        sag_latents(pipe)


def test_explain():
    pipe = build_sag()
    before = pag_fast.explain(pipe)
    assert not before.is_patched and before.layers == () and before.steps == {}
    pag_fast.patch(pipe)
    sag_latents(pipe)
    after = pag_fast.explain(pipe)
    assert after.is_patched
    assert after.steps == {"guided passes": 2, "degraded passes": 2}
    text = str(after)
    assert "2, then 1" in text and ATTENTION in text and "once per call" in text
    for wrong in ("perturbed layers", "branch tree", "perturbation", "PAG scale"):
        assert wrong not in text and wrong not in str(before)
    assert "passes of a step" in text and "sag_scale" in text
    assert after.as_dict()["pipeline"] == "StableDiffusionSAGPipeline"


def test_is_listed():
    assert "StableDiffusionSAGPipeline" in pag_fast.supported_pipelines()
    with pytest.raises(ValueError, match="supported_pipelines"):
        pag_fast.patch(SimpleNamespace())
