"""Faults that no test saw when they were planted (``tests/faults.py``), and now one does."""

from __future__ import annotations

import pytest
import torch
from numerics import relative
from slow import FixedJoint, FixedSana
from tiny import build, call_kwargs, latents

import pag_fast
from pag_fast.sharing.row_equality import RowEquality

_NORMED = {
    "SanaPAGPipeline": (
        {"qk_norm": "rms_norm_across_heads"},
        r"transformer_blocks\.2\.",
        FixedSana,
    ),
    "StableDiffusion3PAGPipeline": ({"sd35": True}, r"blocks\.1\.", FixedJoint),
}


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", _NORMED)
def test_queries_and_keys_have_norms_of_their_own(name, cfg):
    """Norms start as ones: as long as all weights are equal, no picture tells them apart."""
    overrides, layer, fixed = _NORMED[name]
    pipe = build(name, **overrides, pag_applied_layers=[layer])
    norms = [
        parameter
        for key, parameter in pipe.transformer.named_parameters()
        if "norm_q" in key or "norm_k" in key or "norm_added" in key
    ]
    assert norms
    with torch.no_grad():
        for parameter in norms:
            parameter.uniform_(0.3, 3.0)
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, cfg=cfg))
    pipe.set_pag_applied_layers([layer], (fixed(3), fixed(2)))
    assert relative(patched, latents(pipe, call_kwargs(name, pipe, cfg=cfg))) < 1e-5


def test_conditioning_that_was_written_into_does_not_lead():
    """Self-Attention Guidance's degraded pass: the guided pass's first rows, unless changed."""
    text = torch.randn(4, 3, 2)
    premise = RowEquality()
    premise.same_objects({"encoder_hidden_states": text}, 4)
    assert premise.leads({"encoder_hidden_states": text[:2]})
    assert not premise.leads({"encoder_hidden_states": text[:2].clone()})
    assert not premise.leads({"encoder_hidden_states": text[2:]})
    text.mul_(2)
    assert not premise.leads({"encoder_hidden_states": text[:2]})
