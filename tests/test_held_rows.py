"""FaceID-Plus: image embeddings that the projection holds, with a row for each of the batch."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from random_adapters import with_ip_adapter
from torch import nn

import pag_fast

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"


def _with_faces(pipe, rows):
    """An IP-Adapter of that kind; ``rows`` says whose embeddings are where (0: uncond's)."""
    from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection as Projection

    torch.manual_seed(3)
    with_ip_adapter(pipe)
    sizes = {"embed_dims": 12, "output_dims": 12, "hidden_dims": 8, "id_embeddings_dim": 6}
    made = Projection(**sizes, depth=1, dim_head=6, heads=2, num_tokens=4, num_queries=4)
    for parameter in made.requires_grad_(False).parameters():
        nn.init.normal_(parameter, std=0.3)
    made.clip_embeds = torch.randn(4, 1, 7, 8)[rows]
    pipe.unet.encoder_hid_proj.image_projection_layers[0] = made.eval()
    return made


def _arguments(cfg, batch=1):
    embeds = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(5))
    return {"ip_adapter_image_embeds": [embeds[[0] * batch + [1] * batch] if cfg else embeds[1:]]}


def _run(pipe, name, cfg=True, **extra):
    kwargs = tiny.call_kwargs(name, pipe, cfg=cfg, **{"steps": 4, **extra})
    return tiny.latents(pipe, {**kwargs, **_arguments(cfg)})


_SOME = {"schedule": pag_fast.Schedule(stop=500)}


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", [SD, XL])
def test_steps_without_the_perturbed_rows(name, cfg):
    """Every row runs in them, as in stock."""
    rows = [0, 1, 1] if cfg else [1, 1]
    pipe = tiny.build(name)
    held = _with_faces(pipe, rows).clip_embeds
    plain, stock = (_run(pipe, name, cfg, pag_adaptive_scale=x) for x in (0.0, 0.005))
    pag_fast.patch(pipe, strict=True)
    assert relative(_run(pipe, name, cfg), plain) < 1e-5 < relative(stock, plain)
    assert relative(_run(pipe, name, cfg, pag_adaptive_scale=0.005), stock) < 1e-5
    assert dict(pipe._pag_fast.steps) == {"shared": 8}
    assert pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds is held


@pytest.mark.parametrize("options", [{}, {"reuse": pag_fast.Reuse(every=2)}, _SOME])
def test_options_that_leave_rows_out(options):
    pipe = tiny.build(SD)
    _with_faces(pipe, [0, 1, 1])
    found = []
    for share in (True, False):
        with pag_fast.patched(pipe, share_branches=share, **options):
            found.append(_run(pipe, SD))
    assert relative(*found) < 1e-5


@pytest.mark.parametrize("somebody", [False, True], ids=["alone", "with a callback"])
@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 1]], ids=["its own rows", "rows of PAG"])
@pytest.mark.parametrize("name", [SD, XL])
def test_pipelines_without_pag(name, rows, somebody):
    """The picture of the PAG pipeline, whose advice is a row for each branch."""

    def write(pipe, step, timestep, kwargs):
        if step == 1:
            pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds.mul_(-2)
        return {}

    extra = {"callback_on_step_end": write} if somebody else {}
    source = tiny.build(name, pag_applied_layers=["mid"])
    held = _with_faces(source, [0, 1, 1])
    embeds = held.clip_embeds.clone()
    truth = _run(source, name, **extra)
    held.clip_embeds = own = embeds[: len(rows)].clone()
    pipe = getattr(diffusers, name.replace("PAG", ""))(**source.components)
    pipe.set_progress_bar_config(disable=True)
    pag_fast.patch(pipe, "mid", pag_scale=3.0, strict=True)
    kwargs = tiny.call_kwargs(name, source, steps=4, **extra)
    assert kwargs.pop("pag_scale") == 3.0
    assert relative(tiny.latents(pipe, {**kwargs, **_arguments(True)}), truth) < 1e-5
    assert held.clip_embeds is own
    assert torch.equal(own, embeds[: len(rows)]) != somebody


def test_without_cfg_and_with_several_pictures():
    own, found = "StableDiffusionPipeline", []
    for rows in ([1], [1, 1], [1] * 4):
        pipe = tiny_hosts.build(own)
        _with_faces(pipe, rows)
        pag_fast.patch(pipe, "mid", pag_scale=3.0, strict=True)
        kwargs = tiny_hosts.call_kwargs(own, pipe, batch=2, cfg=False)
        found.append(tiny_hosts.latents(pipe, {**kwargs, **_arguments(False)}))
    assert relative(found[1], found[0]) < 1e-5
    assert relative(found[2], found[0]) < 1e-5


def test_several_branches():
    branches = [pag_fast.Branch("mid"), pag_fast.Branch("mid", "soft")]
    found = []
    for rows in ([0, 1, 1], [0, 1, 1, 1]):
        pipe = tiny.build(SD)
        _with_faces(pipe, rows)
        pag_fast.patch(pipe, branches=branches)
        found.append(_run(pipe, SD))
    assert relative(*found) < 1e-5


def test_rows_of_cond_and_perturbed_that_differ_run_apart():
    pipe = tiny.build(SD)
    _with_faces(pipe, [0, 1, 2])
    stock = _run(pipe, SD)
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="rows differ in image_projection_layers.0.clip_embeds"):
        assert relative(_run(pipe, SD), stock) < 1e-5


def test_rows_made_to_differ_in_mid_call():
    def write(pipe, step, timestep, kwargs):
        if step == 1:
            pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds[2:].mul_(-2)
        return {}

    pipe = tiny.build(SD)
    held = _with_faces(pipe, [0, 1, 1])
    before = held.clip_embeds.clone()
    stock = _run(pipe, SD, callback_on_step_end=write)
    held.clip_embeds = before
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="rows differ in"):
        assert relative(_run(pipe, SD, callback_on_step_end=write), stock) < 1e-5


def test_rows_of_nobody_are_refused():
    own = "StableDiffusionPipeline"
    pipe = tiny_hosts.build(own)
    _with_faces(pipe, [0, 1, 1, 1])
    pag_fast.patch(pipe, "mid", pag_scale=3.0)
    kwargs = {**tiny_hosts.call_kwargs(own, pipe), **_arguments(True)}
    with pytest.raises(ValueError, match="has 4 rows, and the pipeline's batch has 2, 3 with"):
        pipe(**kwargs)


def test_explain_tells():
    pipe = tiny.build(SD)
    _with_faces(pipe, [0, 1, 1])
    told = str(pag_fast.explain(pag_fast.patch(pipe), flops=False))
    assert "image embeddings on a projection" in told
