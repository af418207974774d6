"""Faults that no test saw when they were planted (``tests/faults.py``), and now one does."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import relative
from slow import FixedJoint, FixedSana
from tiny import build, call_kwargs, latents, unet

import pag_fast
from pag_fast.fusion import Fusion
from pag_fast.models.registry import fusable_processors
from pag_fast.runtime.undoing import undo_after_error, undo_all
from pag_fast.sag.shared import SharedPasses
from pag_fast.sharing.row_equality import RowEquality
from pag_fast.sharing.rows import BranchState

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


def test_projections_for_a_processor_that_is_not_listed_stay_apart():
    """Nobody has looked whether it calls them in this order, on one tensor."""
    model = unet()
    known = fusable_processors(model)
    assert "queries" in " ".join(Fusion(model, fusable=known).summary())
    another = type("AnotherProcessor", (AttnProcessor2_0,), {"__module__": "diffusers.models.new"})
    model.set_attn_processor(another())
    assert "queries" not in " ".join(Fusion(model, fusable=known).summary())


def test_a_degraded_pass_of_other_conditioning_computes_its_own():
    """And the guided pass after it does not get what it has left."""
    model = unet().requires_grad_(False)
    shared = SharedPasses(model, BranchState(), keeps=True)
    key = shared.kept.invariants[0]
    shared.text.slabs = None
    prompts, other = torch.randn(4, 5, 12), torch.randn(2, 5, 12)
    time = torch.tensor(1)
    for _ in range(2):
        shared.guided(prompts, time, same=True)
        assert torch.equal(key.run(prompts), key.module(prompts))
        shared.degraded(other, time, leads=False)
        assert torch.equal(key.run(other), key.module(other))
    shared.guided(prompts, time, same=True)
    first = key.run(prompts)
    shared.degraded(prompts[:2], time, leads=True)
    assert key.run(prompts[:2]).data_ptr() == first.data_ptr()  # handed out, as it leads


def test_undoing_goes_on_and_the_first_error_is_raised():
    done = []

    def step(error):
        done.append(error)
        raise error

    errors = KeyError("first"), ValueError("second")
    with pytest.raises(KeyError, match="first"):
        undo_all(
            *[lambda error=error: step(error) for error in errors], lambda: done.append("last")
        )
    assert done == [*errors, "last"]
    done.clear()
    undo_after_error(*[lambda error=error: step(error) for error in errors])
    assert done == [*errors]
