"""Guiders are saved and loaded by their configuration, and what is wrong in it is named."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from modular import ALWAYS, case, denoise, new_case, snapshot

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance


@pytest.mark.parametrize(
    "guider",
    [
        PAG(perturbed_guidance_layers=["mid", "blocks.3"], perturbed_guidance_scale=1.5),
        PAG(perturbed_guidance_config=LayerSkipConfig([1, 2], fqn="transformer_blocks")),
        SLG(skip_layer_guidance_layers=[7, 8, 9]),
        SLG(skip_layer_config=[LayerSkipConfig([1], fqn="blocks", skip_ff=False)]),
    ],
)
def test_saved_and_loaded(guider, tmp_path):
    guider.save_pretrained(tmp_path)
    loaded = type(guider).from_pretrained(tmp_path)
    assert isinstance(loaded, (diffusers.PerturbedAttentionGuidance, diffusers.SkipLayerGuidance))
    assert loaded.skip_layer_config == guider.skip_layer_config
    hidden = {"_use_default_values"}
    config, *others = (
        {k: v for k, v in g.config.items() if k not in hidden}
        for g in (guider, loaded, guider.new())
    )
    assert others == [config, config]
    assert json.loads((tmp_path / "guider_config.json").read_text())
    assert "num_conditions" in repr(guider)


def test_a_configuration_is_not_changed():
    config = LayerSkipConfig([3])
    with_config = denoise(case("sd3"), PAG(perturbed_guidance_config=config, **ALWAYS))
    assert config == LayerSkipConfig([3])
    by_index = denoise(case("sd3"), PAG(perturbed_guidance_layers=3, **ALWAYS))
    assert torch.equal(with_config[-1], by_index[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAG(perturbed_guidance_layers=1, perturbed_guidance_config={}), "choose one"),
        (lambda: PAG(perturbed_guidance_config=3), "must be a LayerSkipConfig"),
        (lambda: PAG(perturbed_guidance_layers=[]), "layers is empty"),
        (lambda: PAG(perturbed_guidance_start=0.5, perturbed_guidance_stop=0.1), "start <= stop"),
        (lambda: PAG(backend="cuda"), "choose one of auto, torch, triton"),
        (lambda: SLG(skip_layer_guidance_layers="mid"), "index of a block"),
        (lambda: SLG(skip_layer_guidance_layers=[]), "index of a block"),
        (lambda: SLG(skip_layer_config={"indices": []}), "indices are empty"),
        (lambda: SLG(skip_layer_config={"indices": [1], "dropout": 0.5}), "dropout of 0.5"),
        (
            lambda: SLG(skip_layer_config={"indices": [1], "skip_attention_scores": True}),
            "choose one",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("guider", "name", "message"),
    [
        (PAG(perturbed_guidance_layers="nowhere"), "sd3", "matches none of"),
        (PAG(perturbed_guidance_config={"indices": [9]}), "sd3", "has blocks 0 to 5; got 9"),
        (PAG(perturbed_guidance_config={"indices": [0], "fqn": "blocks"}), "sd3", "no list of"),
        (SLG(), "sd", "no default layers"),
        (SLG(skip_layer_guidance_layers=6), "sd3", "has blocks 0 to 5; got 6"),
    ],
)
def test_layers_that_are_not_there(guider, name, message):
    setup = case(name)
    before = snapshot(setup.model)
    with pytest.raises(ValueError, match=message):
        denoise(setup, guider)
    assert snapshot(setup.model) == before


def test_a_processor_that_ours_does_not_stand_for():
    class Adapter:
        def __call__(self, attn, hidden_states, *_, **__):
            return hidden_states

    setup = new_case("wan")
    setup.model.blocks[2].attn1.set_processor(Adapter())
    with pytest.raises(ValueError, match=r"blocks\.2\.attn1 runs Adapter"):
        denoise(setup, PAG(**ALWAYS))


def test_a_model_that_nobody_knows():
    with pytest.raises(ValueError, match="no module with an attention processor"):
        guider = PAG()
        guider.prepare_models(torch.nn.Linear(1, 1))
