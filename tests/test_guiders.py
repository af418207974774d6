"""The guiders for modular pipelines draw the same pictures as whole forwards."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import diffusers
import pytest
import torch
from modular import (
    ALWAYS,
    NEW_CASES,
    SLG_ALWAYS,
    STEPS,
    case,
    denoise,
    differences,
    new_case,
    perturbed,
    slow,
)
from numerics import relative

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance
CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
CASES = {
    "sd": ["default", "several"],
    "xl": ["default", "several", "up"],
    "motion": ["several", "last"],
    "sd3": ["default", "several", "last", "first"],
    "sd35": ["several", "attn2"],
    "hunyuan": ["default", "last"],
    "pixart": ["default", "first"],
    "sana": ["several"],
}


@CFG
@pytest.mark.parametrize(
    ("name", "which"), [(name, which) for name, sets in CASES.items() for which in sets]
)
def test_pag_equals_three_whole_forwards(name, which, cfg):
    setup = case(name)
    layers, scale = setup.layers[which], 5.0 if cfg else 1.0
    guider = PAG(guidance_scale=scale, perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    naively = perturbed(setup, layers)
    arguments = {"guidance_scale": scale, "scale": 2.8}
    expected = slow(setup, naively, active=range(STEPS), **arguments)
    assert max(differences(result, expected)) < 1e-5
    assert {len(passes) for passes in result.passes} == {3 if cfg else 2}
    assert not guider._warned, "the perturbed pass ran as a whole"
    # perturbing changes the picture
    without = slow(setup, naively, active=(), **arguments)
    assert min(differences(result, without)) > 1e-3


@CFG
@pytest.mark.parametrize("which", ["default", "several"])
@pytest.mark.parametrize("name", NEW_CASES)
def test_pag_in_models_without_a_pag_pipeline(name, which, cfg):
    setup = new_case(name)
    layers, scale = setup.layers[which], 5.0 if cfg else 1.0
    guider = PAG(guidance_scale=scale, perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    naively = perturbed(setup, layers)
    arguments = {"guidance_scale": scale, "scale": 2.8}
    expected = slow(setup, naively, active=range(STEPS), **arguments)
    assert max(differences(result, expected)) < 1e-5
    assert not guider._warned, "the perturbed pass ran as a whole"
    without = slow(setup, naively, active=(), **arguments)
    assert min(differences(result, without)) > 1e-4


@CFG
@pytest.mark.parametrize("original", [True, False])
def test_formulas_are_those_of_diffusers(cfg, original):
    scale = 5.0 if cfg else float(not original)
    arguments = {
        "guidance_scale": scale,
        "guidance_rescale": 0.7,
        "use_original_formulation": original,
    }
    for active in (True, False):
        skip = {"perturbed_guidance_scale": 2.8 if active else 0.0, "perturbed_guidance_layers": 0}
        ours, stock = PAG(**arguments, **skip), diffusers.PerturbedAttentionGuidance(
            **arguments, **skip
        )  # fmt: skip
        names = ["pred_cond"] + ["pred_uncond"] * cfg + ["pred_cond_skip"] * active
        predictions = {name: torch.randn(2, 4, 8, 8) for name in names}
        out, expected = ours.forward(**predictions), stock.forward(**predictions)
        assert relative(out.pred, expected.pred) < 1e-6
        assert out.pred_cond is predictions["pred_cond"]
        assert out.pred_uncond is predictions.get("pred_uncond")


@pytest.mark.parametrize("layers", ["mid", "up_blocks.1.attentions.1", "down_blocks.1"])
@pytest.mark.parametrize("extra", ["controlnet", "freeu"])
def test_what_writes_into_a_unets_streams(extra, layers):
    setup = case("sd")
    if extra == "freeu":
        setup.model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    else:
        shapes = [(8, 8), (8, 8), (8, 4), (16, 4), (16, 2), (16, 2)]
        setup.fixed["down_block_additional_residuals"] = tuple(
            torch.randn(2, channels, size, size) for channels, size in shapes
        )
        setup.fixed["mid_block_additional_residual"] = torch.randn(2, 16, 2, 2)
    guider = PAG(perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, perturbed(setup, layers), active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5
    assert not guider._warned


def test_a_fork_behind_skips_of_its_own_block():
    setup, layers = case("sd", layers_per_block=2), "down_blocks.1.attentions.1"
    guider = PAG(perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, perturbed(setup, layers), active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5
    assert not guider._warned


def test_arguments_that_the_model_uses_up():
    """A T2I-Adapter's residuals are taken from their list, one by one."""
    setup = case("sd")
    shapes = [(8, 8), (16, 4), (16, 2)]
    residuals = [torch.randn(2, channels, size, size) for channels, size in shapes]

    model = setup.model

    def forward(**kwargs):
        return model(**kwargs, down_intrablock_additional_residuals=list(residuals))

    guider = PAG(perturbed_guidance_layers="up_blocks.1", **ALWAYS)
    result = denoise(setup, guider, run=forward)
    setup.model = forward
    chosen = perturbed(dataclasses.replace(setup, model=model), "up_blocks.1")
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, chosen, active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5


def test_a_controlnet_of_sd3():
    setup = case("sd3")
    setup.fixed["block_controlnet_hidden_states"] = [torch.randn(2, 16, 16) for _ in range(3)]
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, perturbed(setup, 3), active=range(STEPS), **scales)
    assert max(differences(denoise(setup, PAG(**ALWAYS)), expected)) < 1e-5


def test_inference_mode():
    setup = case("xl")
    expected = denoise(setup, PAG(**ALWAYS))
    with torch.inference_mode():
        result = denoise(setup, PAG(**ALWAYS))
    assert max(differences(result, expected)) == 0


def test_a_block_state_is_as_good():
    setup = case("pixart")
    guider = PAG(**ALWAYS)
    expected = denoise(setup, guider)
    result = denoise(setup, guider, from_block_state=True)
    assert all(
        torch.equal(a, b) for a, b in zip(result.predictions, expected.predictions, strict=True)
    )


def test_cfg_window_and_switch():
    setup = case("sd3")
    guider = PAG(start=0.2, stop=0.8, perturbed_guidance_start=0.4, perturbed_guidance_stop=1.0)
    passes = denoise(setup, guider, steps=5).passes
    cond, uncond, perturbed = "pred_cond", "pred_uncond", "pred_cond_skip"
    assert passes == [[cond], [cond, uncond], [cond, uncond], [cond, uncond, perturbed],
                      [cond, perturbed]]  # fmt: skip
    guider.disable()
    assert denoise(setup, guider).passes == [[cond]] * STEPS
    guider.enable()
    assert denoise(setup, guider, steps=5).passes == passes


@contextmanager
def _skipped(blocks, returns):
    """Blocks that return what they are given, the plain way."""
    before = [block.forward for block in blocks]
    for block in blocks:
        block.forward = returns
    yield
    for block in blocks:
        del block.forward
    assert [block.forward for block in blocks] == before


@CFG
@pytest.mark.parametrize("name", ["sd3", "pixart", "xl"])
def test_slg_equals_three_whole_forwards(name, cfg):
    setup = case(name)
    scale = 5.0 if cfg else 1.0
    if name == "xl":
        config = LayerSkipConfig([0, 1], fqn="mid_block.attentions.0.transformer_blocks")
        guider = SLG(guidance_scale=scale, skip_layer_config=config, **SLG_ALWAYS)
        blocks = setup.model.mid_block.attentions[0].transformer_blocks
    else:
        layers = [2, 4]
        guider = SLG(guidance_scale=scale, skip_layer_guidance_layers=layers, **SLG_ALWAYS)
        blocks = [setup.model.transformer_blocks[i] for i in layers]

    def returns(hidden_states, encoder_hidden_states=None, **_):
        both = (encoder_hidden_states, hidden_states)
        return both if name == "sd3" else hidden_states

    result = denoise(setup, guider)
    arguments = {"guidance_scale": scale, "scale": 2.8}
    expected = slow(setup, lambda: _skipped(blocks, returns), active=range(STEPS), **arguments)
    assert max(differences(result, expected)) < 1e-5
    without = slow(setup, lambda: None, active=(), **arguments)
    assert min(differences(result, without)) > 1e-3
    assert not guider._warned, "the perturbed pass ran as a whole"


@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "ltx", "hunyuan_video"])
def test_slg_in_other_models(name):
    setup, config = new_case(name), LayerSkipConfig([1])
    configs = [config]
    chosen = [_blocks_of(setup.model)[1]]
    if hasattr(setup.model, "single_transformer_blocks"):
        configs.append(LayerSkipConfig([0], fqn="single_transformer_blocks"))
        chosen.append(setup.model.single_transformer_blocks[0])

    def returns(hidden_states, encoder_hidden_states=None, *_, **__):
        if name in ("flux", "qwen"):
            return encoder_hidden_states, hidden_states
        return (hidden_states, encoder_hidden_states) if name == "hunyuan_video" else hidden_states

    guider = SLG(skip_layer_config=configs, **SLG_ALWAYS)
    result = denoise(setup, guider)
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, lambda: _skipped(chosen, returns), active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5
    assert not guider._warned
    by_default = denoise(setup, SLG(**SLG_ALWAYS))
    assert min(differences(by_default, slow(setup, list, active=(), **scales))) > 1e-4


def _blocks_of(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


@pytest.mark.parametrize(
    "config",
    [
        {"skip_attention": True, "skip_ff": False},
        {"skip_attention": False, "skip_ff": True},
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    ],
    ids=["attention", "feed-forward", "scores"],
)
def test_slg_of_parts_equals_stock(config):
    """On a model for which stock's hooks are right."""
    fqn = "mid_block.attentions.0.transformer_blocks"
    setup = case("sd")
    made = [
        cls(skip_layer_config=LayerSkipConfig([0], fqn=fqn, **config), **SLG_ALWAYS)
        for cls in (SLG, diffusers.SkipLayerGuidance)
    ]
    result, expected = (denoise(setup, guider) for guider in made)
    # stock leaves step 0 out
    assert relative(result[0], expected[0]) > 1e-3
    made[0] = made[0].new(skip_layer_guidance_start=0.01)
    assert max(differences(denoise(setup, made[0]), expected)) < 1e-5
