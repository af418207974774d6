"""Layer names: diffusers' rules and quirks, documented short names, integers, ComfyUI's grammar."""

from __future__ import annotations

import re

import pytest
from tiny import PIPELINES, build

import pag_fast
from pag_fast.models.layer_names import resolve, self_attentions


def _model(name, **overrides):
    pipe = build(name, **overrides)
    return getattr(pipe, PIPELINES[name].denoiser)


def _stock_matches(name, layer):
    """The layers stock diffusers would perturb."""
    pipe = build(name)
    model = getattr(pipe, PIPELINES[name].denoiser)
    pipe._set_pag_attn_processor([layer], True)
    return sorted(key.removesuffix(".processor") for key in pipe.pag_attn_processors), model


@pytest.mark.parametrize("name", PIPELINES)
def test_same_layers_as_stock(name):
    for layers in PIPELINES[name].layers.values():
        for layer in layers:
            expected, model = _stock_matches(name, layer)
            assert sorted(resolve(model, layer)) == expected
            assert expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mid", ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
        ("mid.block", ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
        ("down.block_1", ["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]),
        ("up.block_1.attentions_1", ["up_blocks.1.attentions.1.transformer_blocks.0.attn1"]),
        ("m0", ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
        ("d0", ["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]),
        (
            "u2-3",
            [
                "up_blocks.2.attentions.0.transformer_blocks.0.attn1",
                "up_blocks.2.attentions.1.transformer_blocks.0.attn1",
            ],
        ),
        (
            "m0, u0.0",
            [
                "mid_block.attentions.0.transformer_blocks.0.attn1",
                "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
            ],
        ),
    ],
)
def test_unet_names(name, expected):
    found = resolve(_model("StableDiffusionPAGPipeline"), name)
    assert sorted(found) == sorted(expected)


def test_comfy_inner_blocks():
    model = _model("StableDiffusionXLPAGPipeline")
    found = resolve(model, "d1.1")
    assert list(found) == ["down_blocks.2.attentions.0.transformer_blocks.1.attn1"]
    assert len(resolve(model, "d1.0-1")) == 2


@pytest.mark.parametrize(
    ("pipeline", "block"),
    [("HunyuanDiTPAGPipeline", "blocks"), ("SanaPAGPipeline", "transformer_blocks")],
)
def test_integers(pipeline, block):
    model = _model(pipeline)
    assert list(resolve(model, 3)) == [f"{block}.3.attn1"]
    assert list(resolve(model, [0, 5])) == [f"{block}.0.attn1", f"{block}.5.attn1"]


def test_patch_takes_what_stock_refuses():
    """HunyuanDiT's own docstring passes integers, which stock refuses."""
    pipe = build("HunyuanDiTPAGPipeline")
    with pytest.raises(ValueError):
        pipe.set_pag_applied_layers([3])
    pag_fast.patch(pipe, 3)
    assert pag_fast.explain(pipe, flops=False).layers == ("blocks.3.attn1",)
    pipe.set_pag_applied_layers([2, "blocks.4"])
    assert len(pag_fast.explain(pipe, flops=False).layers) == 2


@pytest.mark.parametrize("exact", [False, True])
def test_exact_names_end_where_a_component_ends(exact):
    model = _model("PixArtSigmaPAGPipeline", num_layers=12)
    count = 1 if exact else 3
    assert len(resolve(model, "blocks.1", exact=exact)) == count
    assert len(resolve(model, r"blocks.(1|2)", exact=exact)) == count + 1
    assert len(resolve(model, "transformer_blocks", exact=exact)) == 12


@pytest.mark.parametrize(
    "layer", ["down.block_7", "u9", "nothing", 99, "m0.4", "up_blocks.0.attentions"]
)
def test_b17_a_name_that_matches_nothing_says_what_would(layer):
    model = _model("StableDiffusionPAGPipeline")
    with pytest.raises(ValueError) as error:
        resolve(model, layer)
    message = str(error.value)
    assert repr(layer) in message
    assert "none of the" in message
    # the layers it offers exist
    offered = re.search(r"Its layers are: (.*?)\. A part", message)[1].split(", ")
    for name in offered:
        if name != "…":
            assert resolve(model, name)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers is empty"),
        ([None], "strings or integers"),
        ([True], "strings or integers"),
        (["("], "not a valid regular expression"),
        ([1.5], "strings or integers"),
    ],
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        resolve(_model("StableDiffusionPAGPipeline"), layers)


def test_only_self_attention_is_offered():
    model = _model("StableDiffusionXLPAGPipeline")
    assert self_attentions(model)
    assert not [name for name in self_attentions(model) if name.endswith("attn2")]
