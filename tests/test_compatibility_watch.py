"""What is around a model, what comes and goes on it, and what shares it out among processes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import diffusers
import older
import pytest
import torch
from diffusers.hooks.layer_skip import TransformerBlockSkipHook as LayerSkip
from strangers import CACHE, WEIGHTS, answers_of, flux, no_gradients, unet, wrap  # noqa: F401
from torch import nn

from pag_fast.runtime.compatibility import (
    UNKNOWN,
    Answer,
    Compatibility,
    Finding,
    combined,
    explain_lines,
    look,
    refuse,
)
from pag_fast.runtime.compatibility.watch import Watch

# ---- around the model ----


def test_surroundings() -> None:
    model, watch = unet(), Compatibility()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {f.what: f.answer for f in watch.look(model)} == {"torch.autocast": WEIGHTS}
    torch.use_deterministic_algorithms(True)
    try:
        assert {f.answer for f in watch.look(model)} == {Answer.FINE}
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.look(model) == ()
    with torch.enable_grad():
        assert {f.what for f in watch.look(model)} == {"gradients"}
        model.requires_grad_(False)
        assert watch.look(model) == ()
    model.train()
    assert combined(watch.look(model)) == WEIGHTS
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    dropout.p = 0.5
    assert combined(Compatibility().look(model)) == UNKNOWN
    model.enable_gradient_checkpointing()
    with torch.enable_grad(), pytest.raises(ValueError, match="checkpointing"):
        refuse(look(model))


def test_compiled_parts_are_fine() -> None:
    model: Any = unet()
    model.mid_block.forward = torch.compile(model.mid_block.forward, backend="eager")
    model.conv_in.compile(backend="eager")
    assert answers_of(model) == {"torch.compile": Answer.FINE}
    wrap(model.conv_out)
    model.conv_out.forward = torch.compile(model.conv_out.forward, backend="eager")
    assert combined(look(model)) == UNKNOWN


# ---- the watch ----


def test_watch_sees_what_comes_and_goes() -> None:
    model, watch = flux(), Compatibility()
    assert watch.look(model) == ()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    assert combined(watch.look(model)) == CACHE
    block = model.transformer_blocks[0]
    block._diffusers_hook.register_hook(diffusers.hooks.ModelHook(), "above")
    assert combined(watch.look(model)) == UNKNOWN
    block._diffusers_hook.remove_hook("above")
    assert combined(watch.look(model)) == CACHE
    model.disable_cache()
    assert watch.look(model) == ()
    handle = block.attn.register_forward_hook(lambda *a: None)
    assert combined(watch.look(model)) == UNKNOWN
    handle.remove()
    handle = block.attn.to_q.register_forward_hook(lambda *a: None)
    assert [f.where for f in watch.look(model)] == ["transformer_blocks.0.attn.to_q"]
    handle.remove()
    assert watch.look(model) == ()
    block.attn.to_q = nn.Linear(16, 16)
    wrap(block.attn.to_q)  # of a module that came later, in the place of its like
    assert [f.where for f in watch.look(model)] == ["transformer_blocks.0.attn.to_q"]


def test_watch_sees_a_hook_go_from_below_another_and_a_mark_on_the_model() -> None:
    model, watch = flux(), Compatibility()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    registry = model.transformer_blocks[0]._diffusers_hook
    registry.register_hook(LayerSkip(dropout=1.0), "above")
    assert [f.what for f in watch.look(model)][:2] == ["FirstBlockCache", "layer skipping"]
    registry.remove_hook("fbc_leader_block_hook", recurse=False)
    assert watch.look(model)[0].what == "layer skipping"
    model = flux()
    assert watch.look(model) == ()
    model._parallel_config = object()
    assert [f.what for f in watch.look(model)] == ["context parallelism"]


@older.newest("its cache_context gives the model a registry of hooks")
def test_watch_looks_again_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pag_fast.runtime import compatibility

    looked = []
    own = compatibility.attached
    monkeypatch.setattr(compatibility, "attached", lambda *a, **k: looked.append(a) or own(*a, **k))
    model, watch = flux(), Compatibility()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    first = watch.look(model)
    with model.cache_context("cond"):
        assert watch.look(model) == first == watch.look(model)
    assert len(looked) == 1
    wrap(model.proj_out)
    watch.look(model)
    assert len(looked) == 2


def test_watch_does_not_hold_the_model() -> None:
    model, watch = unet(), Compatibility()
    watch.look(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_lines_for_explain() -> None:
    findings = (
        Finding("a", "", Answer.FINE, "nothing."),
        Finding("b", "x and 2 more", UNKNOWN, "unshared."),
    )
    assert explain_lines(findings) == ("b (x and 2 more): unshared.", "a: nothing.")
    refuse(findings)
    assert explain_lines(()) == ()


def test_nothing_is_rewritten_where_nothing_is() -> None:
    """Functions are compared one by one, as objects."""
    model = unet()
    watch = Watch(model, list(model.named_modules()))
    assert not watch.rewritten()
    assert not watch.changed(model)
