"""Known pipelines and models as if nobody had described them: the same picture, the same forks."""

from __future__ import annotations

import pytest
import torch
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents, slow_pag

import pag_fast
from pag_fast.analysis.flops import patched_flops
from pag_fast.analysis.published import meta_twin
from pag_fast.config import PatchConfig
from pag_fast.models import registry as models
from pag_fast.models.layer_names import resolve
from pag_fast.pipelines import registry as pipelines
from pag_fast.sharing.rows import SPLIT

# one of each denoiser whose attention is PyTorch's and whose guidance is linear
LINEAR = [
    "StableDiffusionPipeline",
    "AnimateDiffPipeline",
    "StableDiffusion3Pipeline",
    "HunyuanDiTPipeline",
    "PixArtSigmaPipeline",
    "FluxPipeline",
    "WanPipeline",
    "LTXPipeline",
    "CogVideoXPipeline",
    "HunyuanVideoPipeline",
]
NORMALISED = ["QwenImagePipeline", "Lumina2Pipeline"]
WRITTEN = PatchConfig(cache_conditioning=False, fewer_launches=False)


def _present(names):
    return [name for name in names if name in HOSTS]


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.fixture
def hide(monkeypatch):
    """Takes all written descriptions away, and gives them back."""
    models_before, pipelines_before = models.DESCRIPTIONS, pipelines.PIPELINES

    def hidden(models_too=True, back=False):
        monkeypatch.setattr(models, "DESCRIPTIONS", models_before if back or not models_too else ())
        monkeypatch.setattr(pipelines, "PIPELINES", pipelines_before if back else ())

    yield hidden
    hidden(back=True)


def _exactly(names):
    return [f"^{name}$".replace(".", r"\.") for name in names]


def _shared(plan):
    """Blocks and modules in front of the fork that run without the perturbed rows."""
    names = {site.name for site in plan.sites if site.runs < SPLIT}
    # those that run without them behind it, too, or in the fork's block, are another matter
    return {name for name in names if name.rpartition(".")[2].isdigit() and "resnets" not in name}


@pytest.mark.parametrize("name", _present(LINEAR))
def test_the_same_picture_and_the_same_fork(name, hide):
    spec = HOSTS[name]
    pipe = build(name)
    model, batch = _model(pipe), spec.batches[-1]
    attentions = resolve(model, spec.layers["middle"])

    def kwargs():
        return call_kwargs(name, pipe, batch=batch)

    with slow_pag(pipe, name, list(attentions.values()), 3.0, spec.cfg_scale(kwargs())):
        truth = latents(pipe, kwargs())
    written = models.describe(model).plan(model, set(attentions), merge=False, blocks={})
    stock = latents(pipe, kwargs())

    hide()
    assert name not in [entry.name for entry in pipelines.PIPELINES]
    with pag_fast.patched(pipe, _exactly(attentions)):
        derived, again = latents(pipe, kwargs()), latents(pipe, kwargs())
        assert not pipe._pag_fast.fallbacks
        assert dict(pipe._pag_fast.steps) == {"shared": 4}
        found = models.describe(model)
        plan = found.plan(model, set(attentions), merge=False, blocks={})
        twin = meta_twin(model)
    assert relative(derived, truth) < 1e-5
    assert torch.equal(derived, again)
    assert torch.equal(latents(pipe, kwargs()), stock)
    assert plan.fork == written.fork and plan.order == written.order
    assert _shared(written) <= _shared(plan) or "UNet" in type(model).__name__

    def inputs(rows):
        return found.inputs(twin, models_tensors(twin), rows, (1, 1, 1))

    flops = patched_flops(twin, _exactly(attentions), inputs, cfg=not spec.apart, config=WRITTEN)
    hide(back=True)
    least = patched_flops(twin, _exactly(attentions), inputs, cfg=not spec.apart, config=WRITTEN)
    # keys of the text, projections of the fork and uncond's beginning are shared where it is known
    assert least <= flops < 1.08 * least, flops / least


def models_tensors(model):
    from pag_fast.models.tensors import NewTensors

    parameter = next(model.parameters())
    return NewTensors(parameter.device, parameter.dtype)


@pytest.mark.parametrize("name", _present(NORMALISED))
def test_guidance_that_is_not_linear_is_seen(name, hide):
    pipe, spec = build(name), HOSTS[name]
    hide()
    pag_fast.patch(pipe, _exactly(resolve(_model(pipe), spec.layers["middle"])))
    with pytest.warns(UserWarning, match=f"{name} does more to the predictions than to weigh them"):
        latents(pipe, call_kwargs(name, pipe))
    assert pipe._pag_fast.steps == {"shared": 2}
    # with strict=True it is an error
    pag_fast.patch(pipe, _exactly(resolve(_model(pipe), spec.layers["middle"])), strict=True)
    with pytest.raises(ValueError, match=r"are left unexplained\): PAG's difference"):
        latents(pipe, call_kwargs(name, pipe))


@pytest.mark.parametrize(
    "name",
    _present(
        [
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionAdapterPipeline",
            "FluxKontextInpaintPipeline",
            "FluxControlPipeline",
            "WanImageToVideoPipeline",
            "LTXConditionPipeline",
            "StableDiffusion3ControlNetPipeline",
        ]
    ),
)
def test_an_unknown_pipeline_of_a_known_model(name, hide):
    """Its passes are seen; what is known of the model counts."""
    spec, pipe = HOSTS[name], build(name)
    attentions = resolve(_model(pipe), spec.layers["middle"])

    def kwargs():
        return call_kwargs(name, pipe, batch=spec.batches[-1])

    with slow_pag(pipe, name, list(attentions.values()), 3.0, spec.cfg_scale(kwargs())):
        truth = latents(pipe, kwargs())
    hide(models_too=False)
    with pag_fast.patched(pipe, _exactly(attentions)):
        assert relative(latents(pipe, kwargs()), truth) < 1e-5
        assert not pipe._pag_fast.fallbacks
        assert dict(pipe._pag_fast.steps) == {"shared": 2}


def test_linear_attention_is_refused(hide):
    pipe = build("SanaPipeline")
    before = latents(pipe, call_kwargs("SanaPipeline", pipe))
    hide()
    pag_fast.patch(pipe, "blocks.1")
    with pytest.raises(ValueError, match="none was seen that mixes tokens of the image by PyTorch"):
        latents(pipe, call_kwargs("SanaPipeline", pipe))
    pag_fast.unpatch(pipe)
    assert torch.equal(latents(pipe, call_kwargs("SanaPipeline", pipe)), before)


def test_three_branches_in_a_batch_are_refused(hide):
    name = "StableDiffusionInstructPix2PixPipeline"
    pipe = build(name)
    hide(models_too=False)
    pag_fast.patch(pipe, "mid")
    with pytest.raises(ValueError, match="runs 3 branches in one batch: which of them is cond"):
        latents(pipe, call_kwargs(name, pipe))


def test_layers_have_to_be_named(hide):
    pipe = build("FluxPipeline")
    hide()
    with pytest.raises(ValueError, match=r"No layers are known .* FluxPipeline: name some, from"):
        pag_fast.patch(pipe)
    with pytest.raises(ValueError, match=r"rescale_mode='partial' needs the scale of CFG"):
        pag_fast.patch(pipe, "blocks.1", rescale_mode="partial", rescale=0.5)
    assert not hasattr(pipe, "_pag_fast")


def test_explain_says_what_was_derived(hide):
    pipe = build("FluxPipeline")
    hide()
    pag_fast.patch(pipe, r"^transformer_blocks\.1")
    before = str(pag_fast.explain(pipe))
    assert "is derived in its first forward" in before and "once per call" not in before
    latents(pipe, call_kwargs("FluxPipeline", pipe))
    found = pag_fast.explain(pipe)
    assert found.fork == "transformer_blocks.1.attn"
    assert any("nobody has described FluxPipeline" in note for note in found.notes)
    assert any("derived from a forward" in note for note in found.notes)
    assert found.flops and all(x.patched < x.stock for x in found.flops)
    costs = pag_fast.layer_costs(pipe)
    assert [x.over_cfg for x in costs.layers] == sorted(
        (x.over_cfg for x in costs.layers), reverse=True
    )
