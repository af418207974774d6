"""The public API: what ``patch`` accepts, refuses, and leaves alone."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.models import registry as families
from pag_fast.pipelines.registry import HOSTS, STOCK_PIPELINES

NAME = "StableDiffusionXLPAGPipeline"


def test_public_names():
    assert sorted(pag_fast.__all__) == sorted(
        [
            "Branch",
            "CompileConfig",
            "PatchConfig",
            "Reuse",
            "Schedule",
            "Step",
            "__version__",
            "explain",
            "layer_costs",
            "patch",
            "patched",
            "supported_pipelines",
            "unpatch",
            "verify",
        ]
    )


def test_every_pag_pipeline_of_diffusers_is_supported():
    """A PAG pipeline that diffusers adds shows up here."""
    import diffusers.pipelines.pag as pag

    theirs = {name for name in dir(pag) if name.endswith("Pipeline") and "PAG" in name}
    assert theirs == set(PIPELINES)
    ours = set(pag_fast.supported_pipelines())
    assert theirs | {"StableDiffusionSAGPipeline", "FluxPipeline", "WanPipeline"} <= ours
    assert ours - theirs - {"StableDiffusionSAGPipeline", *STOCK_PIPELINES} <= set(HOSTS)


def test_patch_returns_the_pipeline_and_keeps_its_face():
    pipe = build(NAME)
    signature = inspect.signature(pipe.__call__)
    assert pag_fast.patch(pipe) is pipe
    assert isinstance(pipe, diffusers.StableDiffusionXLPAGPipeline)
    assert type(pipe).__name__ == NAME
    assert inspect.signature(pipe.__call__) == signature
    assert pag_fast.unpatch(pipe) is pipe
    assert type(pipe) is diffusers.StableDiffusionXLPAGPipeline


def test_no_class_is_changed():
    cls = diffusers.StableDiffusionXLPAGPipeline
    before = {base: dict(vars(base)) for base in cls.__mro__}
    pipe = pag_fast.patch(build(NAME))
    latents(pipe, call_kwargs(NAME, pipe))
    assert {base: dict(vars(base)) for base in cls.__mro__} == before
    other = build(NAME)
    assert type(other) is cls


def test_patching_twice_is_the_second_settings_alone(snapshot):
    pipe = build(NAME)
    before = snapshot(pipe)
    pag_fast.patch(pipe, ["down_blocks"], share_branches=False)
    pag_fast.patch(pipe, ["mid"])
    assert pipe.pag_applied_layers == ["mid"]
    assert pipe._pag_fast.config == pag_fast.PatchConfig(layers=["mid"])
    latents(pipe, call_kwargs(NAME, pipe))
    assert dict(pipe._pag_fast.steps) == {"shared": 2}
    pag_fast.patch(pipe)
    assert pipe.pag_applied_layers == before["layers"]
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert pipe.pag_applied_layers is before["layers"]


def test_unpatching_what_is_not_patched():
    pipe = build(NAME)
    assert pag_fast.unpatch(pipe) is pipe


def test_patched_restores_earlier_settings():
    pipe = pag_fast.patch(build(NAME), ["down_blocks"])
    outer = pipe._pag_fast
    with pag_fast.patched(pipe, ["mid"]) as inner:
        assert inner is pipe
        assert pipe.pag_applied_layers == ["mid"]
    assert pipe._pag_fast is outer
    assert pipe.pag_applied_layers == ["down_blocks"]
    with pytest.raises(RuntimeError), pag_fast.patched(pipe, ["up_blocks"]):
        raise RuntimeError
    assert pipe._pag_fast is outer
    pag_fast.unpatch(pipe)
    assert pipe.pag_applied_layers == ["mid"]


def test_layers_set_after_patching_survive():
    pipe = pag_fast.patch(build(NAME), ["down_blocks"])
    pipe.set_pag_applied_layers("up_blocks")
    patched = latents(pipe, call_kwargs(NAME, pipe))
    pag_fast.unpatch(pipe)
    assert pipe.pag_applied_layers == ["up_blocks"]
    assert relative(patched, latents(pipe, call_kwargs(NAME, pipe))) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["nothing"]}, "matches none of the"),
        ({"layers": []}, "layers is empty"),
        ({"speed": 11}, "Unknown option 'speed': choose from layers, perturbation"),
        ({"backend": "cuda"}, "Unknown backend 'cuda': choose one of auto, torch, triton"),
        ({"perturbation": "blurry"}, "Unknown perturbation 'blurry': choose one of 'identity'"),
        ({"share_branches": 1}, "share_branches must be True or False; got 1"),
        ({"config": "fast"}, "config must be a PatchConfig; got str"),
    ],
)
@pytest.mark.parametrize("patched_before", [False, True])
def test_refusals_leave_the_pipeline_alone(arguments, message, patched_before, snapshot):
    pipe = build(NAME)
    if patched_before:
        pag_fast.patch(pipe, ["down_blocks"])
    before, state = snapshot(pipe), getattr(pipe, "_pag_fast", None)
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **arguments)
    assert snapshot(pipe) == before
    assert getattr(pipe, "_pag_fast", None) is state


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2)])
def test_not_a_pipeline(thing):
    with pytest.raises(ValueError, match="not a pipeline that pag_fast can patch"):
        pag_fast.patch(thing)


def test_a_pipeline_without_pag():
    """One without a denoiser is refused; others are in test_hosts.py and test_derived.py."""
    scheduler = build(NAME).scheduler
    with pytest.raises(ValueError, match=r"DDIMPipeline is not .* can patch: the nearest"):
        pag_fast.patch(diffusers.DDIMPipeline(unet=None, scheduler=scheduler))


def test_config_object_and_overrides():
    config = pag_fast.PatchConfig(layers=["mid"], strict=True)
    pipe = pag_fast.patch(build(NAME), ["up_blocks"], config=config)
    assert pipe._pag_fast.config == pag_fast.PatchConfig(layers=["up_blocks"], strict=True)


def test_processors_given_by_hand():
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe = pag_fast.patch(build(NAME))
    pair = pipe._pag_attn_processors
    pipe.set_pag_applied_layers("mid", pair)
    assert pipe._pag_attn_processors is pair
    with pytest.raises(ValueError, match="to use it"):
        pipe.set_pag_applied_layers("mid", (AttnProcessor2_0(), AttnProcessor2_0()))
    with pytest.raises(ValueError, match="tuple of two processors"):
        pipe.set_pag_applied_layers("mid", AttnProcessor2_0())


def test_private_api_by_hand_is_stock():
    """Upstream's own tests install processors directly and read them back."""
    pipe = pag_fast.patch(build(NAME))
    pipe._set_pag_attn_processor(pag_applied_layers=["mid"], do_classifier_free_guidance=True)
    assert len(pipe.pag_attn_processors) == 2
    rows = torch.randn(3, 4, 8, 8)
    pipe._pag_scale, pipe._pag_adaptive_scale = 3.0, 0.0
    out = pipe._apply_perturbed_attention_guidance(rows, True, 5.0, 10)
    u, c, p = rows.chunk(3)
    assert torch.allclose(out, u + 5 * (c - u) + 3 * (c - p), atol=1e-5)


def test_deep_copies_work_on_their_own():
    pipe = pag_fast.patch(build(NAME))
    expected = latents(pipe, call_kwargs(NAME, pipe))
    twin = copy.deepcopy(pipe)
    assert torch.equal(latents(twin, call_kwargs(NAME, twin)), expected)
    pag_fast.unpatch(twin)
    assert type(twin) is diffusers.StableDiffusionXLPAGPipeline
    assert hasattr(pipe, "_pag_fast")


def test_supported_families_have_a_row_each():
    used = {spec.model for spec in PIPELINES.values()}
    stock = {
        name
        for name, family in ((d.name, d) for d in families.DESCRIPTIONS)
        if family.stock_processors
    }
    assert used == stock
    with pytest.raises(ValueError, match="none of the supported denoisers"):
        families.family_of(torch.nn.Linear(2, 2))


def test_an_unknown_block_structure_runs_unshared():
    """A UNet whose blocks are not known is still right: branches run apart, and it says so."""
    name = "StableDiffusionPAGPipeline"
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipe = build(name, **kinds)
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="unknown structure AttnDownBlock2D"):
        patched = latents(pipe, call_kwargs(name, pipe))
    assert relative(patched, stock) < 1e-5
    assert "run apart" in str(pag_fast.explain(pipe, flops=False))
    pag_fast.patch(pipe, strict=True)
    with pytest.raises(ValueError, match="unknown structure"):
        latents(pipe, call_kwargs(name, pipe))


def test_warns_once():
    pipe = pag_fast.patch(build(NAME))
    sizes = {"negative_original_size": (64, 64), "negative_target_size": (32, 32)}
    with pytest.warns(UserWarning) as seen:
        for _ in range(2):
            latents(pipe, call_kwargs(NAME, pipe, batch=2, **sizes))
    assert len([w for w in seen if "pag_fast" in str(w.message)]) == 1
