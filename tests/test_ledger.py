"""The FLOP ledger: full-size pipelines, integers from shapes, against targets and lower bounds."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import PIPELINES, build

from pag_fast.flops import count, layer_costs, trace
from pag_fast.ledger import card_inputs, entry
from pag_fast.zoo import CARDS, forward_kwargs, meta_model

# TFLOPs of one row in one step, from the models' publications and earlier counts
ROW = {
    "StableDiffusionPAGPipeline": 0.803,
    "StableDiffusionXLPAGPipeline": 6.761,
    "KolorsPAGPipeline": 6.963,
    "AnimateDiffPAGPipeline": 17.75,
    "StableDiffusion3PAGPipeline": 8.904,
    "HunyuanDiTPAGPipeline": 14.37,
    "PixArtSigmaPAGPipeline": 6.634,
    "SanaPAGPipeline": 2.967,
}

# at least this many times fewer FLOPs than stock: pipeline, CFG, factor
TARGETS = [
    ("StableDiffusionXLPAGPipeline", True, 1.118),
    ("StableDiffusionXLPAGPipeline", False, 1.185),
    ("StableDiffusionPAGPipeline", True, 1.135),
    ("AnimateDiffPAGPipeline", True, 1.12),
    ("StableDiffusionXLControlNetPAGPipeline", True, 1.21),
    ("StableDiffusion3PAGPipeline", True, 1.215),
    ("PixArtSigmaPAGPipeline", True, 1.19),
    ("HunyuanDiTPAGPipeline", True, 1.14),
    ("SanaPAGPipeline", True, 1.145),
]


@functools.cache
def _entry(name, cfg, layers=None):
    return entry(name, layers, cfg=cfg)


@pytest.mark.parametrize("name", ROW)
def test_row(name):
    card = CARDS[name]
    model = meta_model(card)
    flops = count(model, card_inputs(card, model)(1))
    assert flops / 1e12 == pytest.approx(ROW[name], rel=0.01)
    assert sum(item.flops for item in trace(model, card_inputs(card, model))) == flops


@pytest.mark.parametrize(("name", "cfg", "factor"), TARGETS)
def test_target(name, cfg, factor):
    assert _entry(name, cfg).cost.speedup >= factor


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", CARDS)
def test_within_one_percent_of_the_bound(name, cfg):
    cost = _entry(name, cfg).cost
    assert 1.0 <= cost.patched / cost.bound <= 1.01


_ELSEWHERE = [
    ("StableDiffusionPAGPipeline", "down_blocks.0.attentions.0"),
    ("StableDiffusionPAGPipeline", "up_blocks.3.attentions.2"),
    ("StableDiffusionXLPAGPipeline", "mid_block.attentions.0.transformer_blocks.9"),
    ("StableDiffusionXLPAGPipeline", "up_blocks.0.attentions.1.transformer_blocks.5"),
    ("AnimateDiffPAGPipeline", "up_blocks.1.motion_modules.2"),
    ("StableDiffusion3PAGPipeline", "blocks.1"),
    ("HunyuanDiTPAGPipeline", "blocks.39"),
    ("PixArtSigmaPAGPipeline", r"blocks\.0\."),
    ("SanaPAGPipeline", "transformer_blocks.0"),
]


@pytest.mark.parametrize(("name", "layer"), _ELSEWHERE)
def test_within_one_percent_of_the_bound_elsewhere(name, layer):
    """Forks in down, mid and up blocks, late in a deep transformer, first and last, several."""
    cost = _entry(name, True, (layer,)).cost
    assert 1.0 <= cost.patched / cost.bound <= 1.01


@pytest.mark.parametrize("name", CARDS)
def test_every_card_takes_its_inputs(name):
    card = CARDS[name]
    for which in ("denoiser", "controlnet") if card.controlnet else ("denoiser",):
        model = meta_model(card, which)
        with torch.no_grad():
            model(**card_inputs(card, model)(2), return_dict=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_inputs_follow_from_any_config(name):
    """For a user's own checkpoint: shapes come from the configuration alone."""
    model = getattr(build(name), PIPELINES[name].denoiser)
    size = {"height": 32, "width": 32, "vae_scale_factor": 2, "frames": 2}
    kwargs = forward_kwargs(model, rows=2, **size)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            kwargs[key] = torch.zeros_like(value)
    if "added_cond_kwargs" in kwargs and kwargs["added_cond_kwargs"].get("time_ids") is not None:
        kwargs["added_cond_kwargs"] = {
            k: torch.zeros_like(v) for k, v in kwargs["added_cond_kwargs"].items()
        }
    with torch.no_grad():
        out = model(**kwargs, return_dict=False)[0]
    assert out.shape[0] == 2


def test_layer_costs_rise_with_an_earlier_fork():
    card = CARDS["PixArtSigmaPAGPipeline"]
    model = meta_model(card)
    costs = layer_costs(model, card_inputs(card, model), cfg=True)
    factors = [cost.over_cfg for cost in costs]
    assert len(costs) == 28
    assert factors == sorted(factors, reverse=True)
    # below 1 at the last block: CFG without PAG does not share uncond and cond at the beginning
    assert 0.99 < factors[-1] < 1.1 < 1.4 < factors[0] < 1.5
