"""Launches of a whole step, patched against stock: at full size of SD 1.5, and as committed."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from shallow_cards import shallow_card
from torch import nn

from pag_fast.analysis.kernel_counts import counted, launch_counts
from pag_fast.analysis.published import CARDS

COUNTS = json.loads(
    (Path(__file__).parent.parent / "benchmarks" / "counts.json").read_text("utf-8")
)
# part of stock's launches that is gone at least: pipeline, CFG, share
TARGETS = [
    ("StableDiffusionXLPAGPipeline", True, 0.25),
    ("StableDiffusionXLPAGPipeline", False, 0.25),
    ("StableDiffusionXLControlNetPAGPipeline", True, 0.26),
    ("StableDiffusionPAGPipeline", True, 0.20),
    ("StableDiffusion3PAGPipeline", True, 0.15),
]
# of few layers
TARGETED = {
    "StableDiffusionXLPAGPipeline": 0.23,
    "StableDiffusionXLControlNetPAGPipeline": 0.26,
    "StableDiffusionPAGPipeline": 0.17,
    "StableDiffusion3PAGPipeline": 0.18,
}


@pytest.mark.parametrize(("name", "cfg", "fewer"), TARGETS)
def test_fewer_launches_and_bytes(name, cfg, fewer):
    """At full size: as in the committed counts, which ``make counts`` counts anew."""
    label = f"{name} {','.join(CARDS[name].documented_layers)}{'' if cfg else ', CFG off'}"
    launches, moved = COUNTS["launches"][label], COUNTS["bytes"][label]
    assert launches["patched"] <= (1 - fewer) * launches["stock"]
    assert moved["patched"] < moved["stock"]


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", dict(TARGETED))
def test_fewer_launches_and_bytes_of_few_layers(name, cfg, monkeypatch):
    monkeypatch.setitem(CARDS, name, shallow_card(name))
    layers = ["blocks.2"] if "Diffusion3" in name else ["mid"]
    counts = launch_counts(name, layers, cfg=cfg)
    print(f"{name}: {counts.stock} → {counts.patched}, {counts.fewer:.1%} fewer")
    assert counts.fewer >= TARGETED[name]
    assert counts.patched_bytes < counts.stock_bytes


def test_launches_at_full_size():
    name = "StableDiffusionPAGPipeline"
    counts = launch_counts(name)
    assert counts.fewer >= 0.20
    if COUNTS["versions"]["diffusers"] == diffusers.__version__:
        launches = {"stock": counts.stock, "patched": counts.patched}
        assert COUNTS["launches"][f"{name} mid"] == launches
        moved = {"stock": counts.stock_bytes, "patched": counts.patched_bytes}
        assert COUNTS["bytes"][f"{name} mid"] == moved


def test_counts_by_hand():
    x = torch.empty(2, 3, 8, device="meta")
    linear = nn.Linear(8, 8, device="meta")
    with counted() as launches:
        linear(x).view(2, 3, 2, 4).transpose(1, 2)  # one product, two views
        x.new_empty(5)
        x + x[:1]
    assert dict(launches.ops) == {"aten::addmm": 1, "aten::add": 1}
    product = 4 * (2 * 3 * 8 + 8 * 8 + 8 + 2 * 3 * 8)
    assert launches.bytes == product + 4 * (48 + 24 + 48)


def test_attention_is_one_launch_and_its_output_lies_heads_last():
    q = torch.empty(2, 4, 5, 8, device="meta")
    with counted() as launches:
        out = F.scaled_dot_product_attention(q, q, q)
        out.transpose(1, 2).flatten(2)
    assert dict(launches.ops) == {"attention": 1}
    assert launches.bytes == 4 * 2 * q.numel()
    assert out.shape == q.shape


def test_unknown_pipeline():
    with pytest.raises(ValueError, match="Unknown pipeline 'Nothing'"):
        launch_counts("Nothing")
    with pytest.raises(ValueError, match="FluxPipeline has no PAG of its own"):
        launch_counts("FluxPipeline")
