"""Launches of a perturbed layer and of the guidance combination, ours against stock's."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.pag.pag_utils import PAGMixin
from launches import CountOps, launches  # noqa: F401

from pag_fast import ops
from pag_fast.processors import (
    PerturbedJointAttention,
    PerturbedLinearAttention,
    PerturbedRotaryAttention,
    PerturbedSelfAttention,
)
from pag_fast.sharing.rows import BranchState

TEXT, TOKENS, WIDTH = 5, 16, 64


def _self_attention(cfg):
    name = "PAGCFGIdentitySelfAttnProcessor2_0" if cfg else "PAGIdentitySelfAttnProcessor2_0"
    return Attention(WIDTH, heads=4, dim_head=16), name, PerturbedSelfAttention, {}


def _rotary(cfg):
    name = "PAGCFGHunyuanAttnProcessor2_0" if cfg else "PAGHunyuanAttnProcessor2_0"
    attn = Attention(WIDTH, heads=4, dim_head=16, qk_norm="layer_norm", eps=1e-6, bias=True)
    rotary = (torch.randn(TOKENS, 16), torch.randn(TOKENS, 16))
    return attn, name, PerturbedRotaryAttention, {"image_rotary_emb": rotary}


def _linear(cfg):
    name = "PAGCFGSanaLinearAttnProcessor2_0" if cfg else "PAGIdentitySanaLinearAttnProcessor2_0"
    return Attention(WIDTH, heads=4, dim_head=16, bias=False), name, PerturbedLinearAttention, {}


def _joint(cfg):
    name = "PAGCFGJointAttnProcessor2_0" if cfg else "PAGJointAttnProcessor2_0"
    attn = Attention(
        WIDTH, heads=4, dim_head=16, added_kv_proj_dim=WIDTH, context_pre_only=False, bias=True
    )
    text = torch.randn(3 if cfg else 2, TEXT, WIDTH)
    return attn, name, PerturbedJointAttention, {"encoder_hidden_states": text}


FAMILIES = {"self": _self_attention, "rotary": _rotary, "linear": _linear, "joint": _joint}


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_perturbed_layer_takes_at_most_half_or_five(family, cfg, launches):  # noqa: F811
    attn, name, ours, arguments = FAMILIES[family](cfg)
    slabs = 3 if cfg else 2
    x = torch.randn(slabs, TOKENS, WIDTH)
    with CountOps() as stocks:
        expected = getattr(stock, name)()(attn, x, **arguments)
    state = BranchState()
    state.slabs = (slabs, slabs, slabs)
    with CountOps() as others:
        out = ours(state, backend="triton")(attn, x, **arguments)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (out, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    total = others.ops.total() + len(launches)
    print(f"{family}: stock {stocks.ops.total()}, ours {total}", stocks.ops, others.ops, launches)
    # four weights and the attention: less is not possible without copying weights together
    assert total == 5 or 2 * total <= stocks.ops.total()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_combination_takes_one_launch_or_two(rescale, launches):  # noqa: F811
    rows = torch.randn(6, 4, 16, 16)
    u, c, p = rows.chunk(3)
    with CountOps() as others:
        ops.combine_guidance(
            u, c, p, guidance_scale=7.0, pag_scale=3.0, rescale=rescale, backend="triton"
        )
    assert others.ops.total() == 0
    assert len(launches) == (2 if rescale else 1)
    pipe = type("P", (), {"do_pag_adaptive_scaling": False, "pag_scale": 3.0})()
    pipe._get_pag_scale = lambda t: 3.0
    with CountOps() as stocks:
        PAGMixin._apply_perturbed_attention_guidance(pipe, rows, True, 7.0, 500)
    assert stocks.ops.total() == 6
