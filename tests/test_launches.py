"""Launches of a whole step at full size, patched against stock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pag_fast.analysis.kernel_counts import counted, launch_counts

# part of stock's launches that is gone at least: pipeline, CFG, share; benchmarks/counts.json has
# the exact numbers of every family
TARGETS = [
    ("StableDiffusionXLPAGPipeline", True, 0.25),
    ("StableDiffusionXLPAGPipeline", False, 0.25),
    ("StableDiffusionXLControlNetPAGPipeline", True, 0.26),
    ("StableDiffusionPAGPipeline", True, 0.20),
    ("StableDiffusion3PAGPipeline", True, 0.15),
]


@pytest.mark.parametrize(("name", "cfg", "fewer"), TARGETS)
def test_fewer_launches_and_bytes(name, cfg, fewer):
    counts = launch_counts(name, cfg=cfg)
    print(f"{name}: {counts.stock} → {counts.patched}, {counts.fewer:.1%} fewer")
    assert counts.fewer >= fewer
    assert counts.patched_bytes < counts.stock_bytes


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
