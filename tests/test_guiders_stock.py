"""What diffusers' guiders get wrong, and ours do not: the table in docs/defects.md."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from modular import (
    ALWAYS,
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

from pag_fast.models.layer_names import resolve

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance


def test_without_cfg_the_perturbed_pass_is_conditional_andperturbed():
    setup = case("sd")
    stock = diffusers.PerturbedAttentionGuidance(
        guidance_scale=1.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=LayerSkipConfig(
            [0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=False,
            skip_attention_scores=True, skip_ff=False),
    )  # fmt: skip
    ours = PAG(guidance_scale=1.0, perturbed_guidance_stop=1.0)
    text = setup.pairs["encoder_hidden_states"]
    for guider, index in ((ours, 0), (stock, 1)):
        guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(0))
        batch = guider.prepare_inputs(setup.pairs)[1]
        assert batch.__guidance_identifier__ == "pred_cond_skip"
        assert batch.encoder_hidden_states is text[index]
    seen = []
    for guider in (ours, stock):
        guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(0))
        with torch.no_grad():
            for _ in range(2):
                guider.prepare_models(setup.model)
                out = setup(setup.model, setup.sample, {"encoder_hidden_states": text[0]})
                guider.cleanup_models(setup.model)
                seen.append(out)
    assert relative(seen[1], seen[0]) > 1e-3
    assert torch.equal(seen[3], seen[2]), "stock perturbs nothing"


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9])
def test_few_steps_have_a_perturbed_one(steps, caplog):
    guider = PAG()
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0])
    with caplog.at_level(logging.WARNING, "pag_fast"):
        active = [_steps_of(g, steps) for g in (guider, stock)]
    assert active == [[min(1, steps - 1)], []]
    assert sum("holds no whole step" in record.message for record in caplog.records) == 1


def _steps_of(guider, steps):
    active = []
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
        if guider.num_conditions == 3:
            active.append(step)
    return active


@pytest.mark.parametrize("window", [(0.01, 0.2), (0.1, 0.5), (0.3, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [20, 28, 30, 50])
def test_windows_that_work_in_stock_are_the_same(window, steps):
    names = ("perturbed_guidance_start", "perturbed_guidance_stop")
    arguments = dict(zip(names, window, strict=True))
    ours = PAG(**arguments)
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0], **arguments)
    assert _steps_of(ours, steps) == _steps_of(stock, steps)
    assert not ours._warned


def test_step_0_is_perturbed_where_the_start_is_0():
    assert _steps_of(PAG(**ALWAYS), 3) == [0, 1, 2]
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0], **ALWAYS)
    assert _steps_of(stock, 3) == [1, 2]


def test_an_index_or_a_list_of_them():
    setup = case("sd3")
    one = denoise(setup, PAG(perturbed_guidance_layers=3, **ALWAYS))
    assert torch.equal(one[-1], denoise(setup, PAG(perturbed_guidance_layers=[3], **ALWAYS))[-1])
    assert torch.equal(one[-1], denoise(setup, PAG(**ALWAYS))[-1])
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=3, **ALWAYS)
    with pytest.raises(TypeError, match="has no len"):
        denoise(setup, stock)
    stock = diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[3], **SLG_ALWAYS)
    with pytest.raises(TypeError, match="has no len"):
        denoise(setup, stock)


def test_stock_refuses_sd3_and_crashes_when_it_skips_its_blocks():
    setup = case("sd3")
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[3], **ALWAYS)
    with pytest.raises(ValueError, match="not registered"):
        denoise(setup, stock)
    _restore(setup.model)
    # parity of ours: test_slg_equals_three_whole_forwards
    stock = diffusers.SkipLayerGuidance(skip_layer_config=LayerSkipConfig([3]), **SLG_ALWAYS)
    with pytest.raises(RuntimeError):
        denoise(setup, stock)
    _restore(setup.model)


@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "hunyuan_video"])
def test_stock_refuses_other_models(name):
    """Parity of ours: test_pag_in_models_without_a_pag_pipeline."""
    setup = new_case(name)
    stack = "blocks" if name == "wan" else "transformer_blocks"
    config = LayerSkipConfig([1], fqn=stack)
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_config=config, **ALWAYS)
    with pytest.raises((ValueError, AttributeError), match=r"not registered|is_cross_attention"):
        denoise(setup, stock)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_stock_returns_two_streams_in_the_wrong_order(name):
    """Parity of ours: test_slg_in_other_models."""
    config = LayerSkipConfig([1], fqn="transformer_blocks")
    stock = diffusers.SkipLayerGuidance(skip_layer_config=config, **SLG_ALWAYS)
    with pytest.raises(RuntimeError):
        denoise(new_case(name), stock)


def _restore(model):
    for module in model.modules():
        vars(module).pop("forward", None)


def test_blocks_are_looked_for_in_a_fixed_order():
    from pag_fast.guiders.selection import stack_of

    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    name, stack = stack_of(model)
    assert name == "transformer_blocks" and stack is model.transformer_blocks
    assert stack_of(model, "single_transformer_blocks")[1] is model.single_transformer_blocks
    with pytest.raises(ValueError, match=r"(?s)no common numbering.*mid_block\.attentions\.0"):
        stack_of(case("sd").model)


def test_attention_that_is_not_pytorchs():
    """Stock waits for ``scaled_dot_product_attention`` to be called."""
    setup = case("sd")
    for module in resolve(setup.model, "attn").values():
        module.set_processor(AttnProcessor())
    fqn = "mid_block.attentions.0.transformer_blocks"
    config = {"indices": [0], "fqn": fqn, "skip_attention": False, "skip_ff": False,
              "skip_attention_scores": True}  # fmt: skip
    arguments = {"guidance_scale": 5.0, "perturbed_guidance_config": config}
    stock = diffusers.PerturbedAttentionGuidance(**arguments, perturbed_guidance_stop=1.0)
    expected = {
        active: slow(setup, perturbed(setup, "mid"), guidance_scale=5.0, scale=2.8, active=active)
        for active in ((), range(STEPS))
    }
    with pytest.raises(ValueError, match="not registered"):
        denoise(setup, stock)
    _restore(setup.model)
    ours = denoise(setup, PAG(**arguments, **ALWAYS))
    assert max(differences(ours, expected[range(STEPS)])) < 1e-5
    assert min(differences(ours, expected[()])) > 1e-3
