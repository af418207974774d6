"""One description per model and per pipeline: complete, true to diffusers, and each of them run."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import older
import pytest
import tiny
import tiny_hosts
import torch
from tiny_hosts import controlnets

import pag_fast
from pag_fast.analysis.published import find_card, meta_model
from pag_fast.models import registry as models
from pag_fast.models.inputs import forward_kwargs
from pag_fast.models.layer_names import self_attentions, transformer_blocks
from pag_fast.pipelines.registry import (
    HOSTS,
    PAG_PIPELINES,
    PIPELINES,
    SAG_PIPELINES,
    denoiser_names,
    describe_pipeline,
    description_of,
    host_of,
)

MODELS = {
    "ControlNetModel": lambda: tiny.controlnet(xl=False),
    "FluxControlNetModel": controlnets.flux_net,
    "HunyuanDiT2DControlNetModel": controlnets.hunyuan_net,
    "QwenImageControlNetModel": controlnets.qwen_net,
    "SD3ControlNetModel": controlnets.sd3_net,
    "SanaControlNetModel": controlnets.sana_net,
    "UNet2DConditionModel": tiny.unet,
    "UNetMotionModel": tiny.motion_unet,
    "SD3Transformer2DModel": lambda: tiny.sd3(sd35=True),
    "HunyuanDiT2DModel": tiny.hunyuan,
    "PixArtTransformer2DModel": tiny.pixart,
    "SanaTransformer2DModel": tiny.sana,
    "FluxTransformer2DModel": tiny_hosts.flux,
    "QwenImageTransformer2DModel": tiny_hosts.qwen,
    "WanTransformer3DModel": tiny_hosts.wan,
    "LTXVideoTransformer3DModel": tiny_hosts.ltx,
    "CogVideoXTransformer3DModel": tiny_hosts.cogvideox,
    "HunyuanVideoTransformer3DModel": tiny_hosts.hunyuan_video,
    "Lumina2Transformer2DModel": tiny_hosts.lumina2,
    **tiny_hosts.SWEPT,
}
# blocks that are there in place of others in some models
_STAND_INS = ("FreeNoise", "HunyuanVideoTokenReplace")
DENOISERS = {entry.name: entry for entry in models.DESCRIPTIONS}
BY_NAME = {entry.name: entry for entry in PIPELINES}


# ---- models ----


@older.newest("models are of a newer one, too")
def test_every_model_has_a_tiny_one():
    described = [entry.name for entry in (*models.DESCRIPTIONS, *models.CONTROLNETS)]
    assert len(set(described)) == len(described)
    assert set(described) == set(MODELS)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_description_fits_its_class(name):
    """Blocks, arguments and processors are those of diffusers."""
    model, entry = MODELS[name](), DENOISERS[name]
    forward = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    assert entry.text - {"image_embeds"} <= set(forward)
    assert set(forward_kwargs(model, rows=2, height=64, width=64)) <= set(forward)
    blocks = [model.get_submodule(block) for block in transformer_blocks(model)]
    kinds = {type(block).__name__ for block in blocks} - {"AnimateDiffTransformer3D"}
    assert kinds == {kind for kind in entry.skippable_blocks if not kind.startswith(_STAND_INS)}
    for block in blocks:
        parameters = inspect.signature(inspect.unwrap(type(block).forward)).parameters
        assert {stream.argument for stream in entry.streams(block)} <= set(parameters)
    own = {type(module.processor).__name__ for module in self_attentions(model).values()}
    assert own <= entry.replaces
    for processor in entry.stock_processors or ():
        assert hasattr(diffusers.models.attention_processor, processor)


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "FluxTransformer2DModel"])
def test_streams_are_in_the_order_of_outputs(name):
    """What diffusers says of a block's outputs, where it says something."""
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    model, entry = MODELS[name](), DENOISERS[name]
    helpers._register_transformer_blocks_metadata()
    for path in transformer_blocks(model):
        block = model.get_submodule(path)
        metadata = helpers.TransformerBlockRegistry.get(type(block))
        order = [stream.argument for stream in entry.streams(block)]
        assert order[metadata.return_hidden_states_index] == "hidden_states"
        assert order[metadata.return_encoder_hidden_states_index] == "encoder_hidden_states"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_as_it_is_made_runs_processors_that_are_fusable(name):
    """And every one that is named is a class of diffusers."""
    model = MODELS[name]()
    known = models.fusable_processors(model)
    own = {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}
    assert known & own
    kinds = {type(m.processor) for m in model.modules() if hasattr(m, "processor")}
    places = [diffusers.models.attention_processor, *map(inspect.getmodule, (type(model), *kinds))]
    assert all(any(hasattr(place, found) for place in places) for found in known)


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_are_those_of_diffusers(name):
    model = MODELS[name]()
    kinds = {type(module).__name__ for module in model.modules()}
    found = models.repeated_blocks(type(model))
    assert kinds & set(found)
    theirs = getattr(model, "_repeated_blocks", None)
    assert not theirs or found >= set(theirs)


def test_a_subclass_is_described_by_its_base():
    model = MODELS["WanTransformer3DModel"]()
    # FSDP and users do so
    model.__class__ = type("FSDPWanTransformer3DModel", (type(model),), {})
    assert models.describe(model) is DENOISERS["WanTransformer3DModel"]
    assert set(forward_kwargs(model, rows=1, height=64, width=64)) >= {"timestep"}
    block = model.blocks[0]
    block.__class__ = type("FSDPWanTransformerBlock", (type(block),), {})
    assert models.describe(model).streams(block)[0].argument == "hidden_states"


def test_unknown_classes_are_named():
    with pytest.raises(ValueError, match="Linear is none of the supported denoisers: Chr"):
        models.describe(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"No inputs are known for Linear; known are .*ControlNet"):
        forward_kwargs(torch.nn.Linear(2, 2), rows=1, height=8, width=8)


def test_a_file_that_describes_nothing_is_an_error():
    with pytest.raises(ImportError, match=r"description defines neither DESCRIPTION nor CONTROLN"):
        tuple(models.described("pag_fast.models", ("DESCRIPTION", "CONTROLNET"), others=()))


# ---- pipelines ----


def test_every_pipeline_has_a_tiny_one():
    assert len(BY_NAME) == len(PIPELINES)
    assert set(PAG_PIPELINES) == set(tiny.PIPELINES)
    assert set(SAG_PIPELINES) == {"StableDiffusionSAGPipeline"}
    supported = set(pag_fast.supported_pipelines())
    assert set(HOSTS) & supported == set(tiny_hosts.HOSTS)
    assert supported <= set(BY_NAME)


_PUBLISHED: dict[str, torch.nn.Module] = {}  # the last few


@pytest.mark.parametrize("name", [*PAG_PIPELINES, *HOSTS])
def test_a_published_model_has_the_default_layers(name):
    entry = BY_NAME[name]
    card = find_card(name)
    assert card.documented_layers == entry.layers and entry.source
    # pipelines of a family share a model, and follow each other
    key = f"{card.denoiser} {card.config}"
    _PUBLISHED[key] = model = _PUBLISHED.pop(key, None) or meta_model(card)
    if len(_PUBLISHED) > 4:
        del _PUBLISHED[next(iter(_PUBLISHED))]
    assert pag_fast.models.layer_names.resolve(model, entry.layers)
    assert card.sequential == entry.sequential


@pytest.mark.parametrize("name", [n for n in BY_NAME if n in pag_fast.supported_pipelines()])
def test_guidance_is_that_of_the_pipeline(name):
    """Its source says whether what CFG returns is scaled by a norm or a deviation."""
    entry, cls = BY_NAME[name], getattr(diffusers, name)
    arguments = inspect.signature(cls.__call__).parameters
    if entry.kind != "injected":
        assert entry.guidance == "linear"
        return
    source = inspect.getsource(cls.__call__)
    norms = any(x in source for x in ("rescale_noise_cfg", "torch.norm(", "vector_norm("))
    assert norms == (entry.guidance == "normalised")
    assert not entry.normalised_by or entry.normalised_by in arguments
    by = "guidance_rescale" if "guidance_rescale" in arguments else entry.normalised_by
    assert entry.normalised_by == by


def test_normalised_calls():
    flux, qwen, pipe = HOSTS["FluxPipeline"], HOSTS["QwenImagePipeline"], SimpleNamespace()
    assert not flux.is_normalised(pipe, {}) and qwen.is_normalised(pipe, {})
    sdxl, lumina = HOSTS["StableDiffusionXLPipeline"], HOSTS["Lumina2Pipeline"]
    assert not sdxl.is_normalised(pipe, {"guidance_rescale": 0.0})
    assert not sdxl.is_normalised(pipe, {"guidance_rescale": None})
    assert sdxl.is_normalised(pipe, {"guidance_rescale": 0.5})
    assert lumina.is_normalised(pipe, {"cfg_normalization": True})
    assert not lumina.is_normalised(pipe, {"cfg_normalization": False})
    # a callback may have changed what the loop reads
    pipe._guidance_rescale = 0.5
    assert sdxl.is_normalised(pipe, {"guidance_rescale": 0.0})
    # which a loop of a user's own does not read
    assert not sdxl.is_normalised(pipe, {})


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_passes_are_as_described(name):
    """How many rows a call of the denoiser has, and how often it is called in a step."""
    pipe, entry = tiny_hosts.build(name), HOSTS[name]
    (attribute, *_) = denoiser_names(pipe)
    rows, model = [], getattr(pipe, attribute)

    def record(_, args, kwargs):
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        rows.append(len(sample))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, steps=1))
    handle.remove()
    expected = {"apart": [1, 1], "alone": [1], "together": [len(entry.rows)]}
    expected["observed"] = [1, 1]  # by the guider that it gets here
    assert rows == expected[entry.passes]


def test_subclasses_and_strangers():
    base = diffusers.StableDiffusionPipeline
    mine = type("Mine", (base,), {})
    assert description_of(mine) is BY_NAME["StableDiffusionPipeline"]
    # a name says nothing
    named = type("MyPAGPipeline", (base,), {})
    assert description_of(named) is BY_NAME["StableDiffusionPipeline"]
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    twice = type("NewPipeline", (base, PAGMixin), {})
    assert description_of(twice) is None, "it has PAG, and nobody has said how"
    pag = type("Mine", (diffusers.StableDiffusionPAGPipeline,), {})
    assert description_of(pag) is BY_NAME["StableDiffusionPAGPipeline"]
    assert host_of(tiny.build("SanaPAGPipeline")) is None
    with pytest.raises(ValueError, match="DDPMPipeline is not a pipeline that pag_fast can patch"):
        describe_pipeline(diffusers.DDPMPipeline.__new__(diffusers.DDPMPipeline))


def test_a_stranger_is_told_of_what_has_its_denoiser():
    pipe = tiny_hosts.build("WanPipeline")
    # by its name it is more like others
    pipe.__class__ = type("FluxAnimatePipeline", (diffusers.DiffusionPipeline,), {})
    with pytest.raises(
        ValueError, match=r"FluxAnimatePipeline is not .* nearest.* Wan.*Pipel"
    ) as e:
        describe_pipeline(pipe)
    assert "pag_fast.supported_pipelines() names all" in str(e.value) and len(str(e.value)) < 300
    pipe.__class__ = type("FluxPriorPipeline", (diffusers.DiffusionPipeline,), {})
    del pipe.transformer
    with pytest.raises(ValueError, match=r"nearest that it can is Flux.*Pipeline, and"):
        describe_pipeline(pipe)


# ---- what a stream holds ----


def test_text_and_padding_stay_where_they_are():
    """A picture of Lumina 2 with shuffled tokens does not depend on its neighbour's prompt."""
    name = "Lumina2Pipeline"
    pipe = pag_fast.patch(tiny_hosts.build(name), ["layers.1"], perturbation="shuffle")
    both = tiny_hosts.call_kwargs(name, pipe, batch=2)

    def run(*rows):
        kwargs = {
            key: value[list(rows)] if isinstance(value, torch.Tensor) else value
            for key, value in both.items()
        }
        kwargs["generator"] = [torch.Generator().manual_seed(row) for row in rows]
        return tiny_hosts.latents(pipe, kwargs)

    together, first, second = run(0, 1), run(0), run(1)
    assert torch.allclose(together, torch.cat([first, second]), atol=1e-5)
    pag_fast.unpatch(pipe)
    assert not torch.allclose(run(0), first, atol=1e-3), "shuffling makes no difference"
