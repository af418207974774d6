"""Guidance of stock pipelines that is resumed where it parts from cond draws the same picture."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import tiny_hosts
import tiny_ltx2
import torch
from numerics import observing, relative
from resumed import LTX2, SD3, patched_guidance, resumed_latents, resumed_pipe

import pag_fast
from pag_fast.pipelines.registry import STOCK_PIPELINES
from pag_fast.runtime.compatibility import row_wise
from pag_fast.runtime.stock_passes import RESUMED, _CondRecord


def _without(name):
    """Arguments that turn the guidance off."""
    if name == SD3:
        return {"skip_guidance_layers": None}
    return {"stg_scale": 0.0, **({} if "HDR" in name else {"audio_stg_scale": 0.0})}


# ---- the same picture ----


def _everywhere():
    """One pipeline in every way, its variants with all there is in a batch."""
    for name in STOCK_PIPELINES:
        yield name, True, 2
        if name == LTX2:
            yield from ((name, True, 1), (name, False, 1), (name, False, 2))


@pytest.mark.parametrize(("name", "cfg", "batch"), _everywhere())
def test_ltx2(name, cfg, batch):
    pipe = resumed_pipe(name)
    stock = resumed_latents(name, pipe, cfg=cfg, batch=batch)
    assert (
        relative(resumed_latents(name, pipe, cfg=cfg, batch=batch, **_without(name)), stock) > 1e-3
    )
    with pag_fast.patched(pipe):
        first = resumed_latents(name, pipe, cfg=cfg, batch=batch)
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3} and not pipe._pag_fast.fallbacks
        again = resumed_latents(name, pipe, cfg=cfg, batch=batch)
    assert relative(first, stock) <= 1e-6 and torch.equal(first, again)
    if not cfg:
        assert torch.equal(first, stock), "the batch is the same"
    assert torch.equal(resumed_latents(name, pipe, cfg=cfg, batch=batch), stock)


@pytest.mark.parametrize("sd35", [False, True])
@pytest.mark.parametrize("layers", [[3, 4], [1], [5], [4, 2], [0], [17], [5, 17]])
def test_sd3(layers, sd35):
    own = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2, 3)} if sd35 else {}
    pipe = tiny_hosts.build(SD3, **own)
    stock = resumed_latents(SD3, pipe, batch=2, skip_guidance_layers=layers)
    with patched_guidance(SD3, pipe):
        patched = resumed_latents(SD3, pipe, batch=2, skip_guidance_layers=layers)
        # the first step is never in the window; before block 0 there is nothing, and no block 17
        wanted = {} if layers in ([0], [17]) else {RESUMED: 3}
        assert dict(pipe._pag_fast.steps) == wanted and not pipe._pag_fast.fallbacks
    assert relative(patched, stock) <= 1e-6
    if not wanted:
        assert torch.equal(patched, stock)


@pytest.mark.parametrize("images", [{"num_images_per_prompt": 2}, {"batch": 2}])
@pytest.mark.parametrize("layers", ["blocks.0", "blocks.2", "blocks.3", "blocks.5"])
def test_sd3_beside_pag(layers, images):
    """Forks of PAG in front of the skipped blocks, at them, and behind."""
    pipe = resumed_pipe(SD3)
    with pag_fast.patched(pipe, layers, pag_scale=3.0):
        both = resumed_latents(SD3, pipe, **images)
        assert dict(pipe._pag_fast.steps) == {"shared": 4, RESUMED: 3}
        host = pipe._pag_fast.host
        pipe._pag_fast.host = dataclasses.replace(host, stock_guidance=None)
        whole = resumed_latents(SD3, pipe, **images)
        assert pipe._pag_fast.steps == {"shared": 8, RESUMED: 3}
        # without PAG a row of text is for one picture
        alone = resumed_latents(SD3, pipe, **images, pag_scale=0.0) if "batch" in images else None
    assert relative(both, whole) <= 1e-6
    assert alone is None or relative(alone, both) > 1e-3, "PAG makes no difference"


@pytest.mark.parametrize("pag_scale", [0.0, 3.0])
def test_nothing_is_shared_where_that_is_asked_for(pag_scale):
    """So that ``verify`` compares with forwards that are whole."""
    pipe = resumed_pipe(SD3)
    with pag_fast.patched(pipe, "blocks.2", pag_scale=pag_scale):
        resumed = resumed_latents(SD3, pipe)
    with pag_fast.patched(pipe, "blocks.2", pag_scale=pag_scale, share_branches=False):
        assert relative(resumed_latents(SD3, pipe), resumed) <= 1e-6
        assert RESUMED not in pipe._pag_fast.steps


def test_several_branches_beside_it():
    pipe = resumed_pipe(SD3)
    branches = [
        pag_fast.Branch(["blocks.1"], "identity", 2.0),
        pag_fast.Branch(["blocks.2"], "skip", 1.0),
    ]
    with pag_fast.patched(pipe, branches=branches):
        both = resumed_latents(SD3, pipe, batch=2)
        assert pipe._pag_fast.steps[RESUMED] == 3
        pipe._pag_fast.host = dataclasses.replace(pipe._pag_fast.host, stock_guidance=None)
        assert relative(both, resumed_latents(SD3, pipe, batch=2)) <= 1e-6


@pytest.mark.parametrize("window", [(0.0, 0.4), (0.3, 1.0), (0.9, 1.0)])
def test_windows(window):
    start, stop = window
    more = {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop, "steps": 6}
    pipe = resumed_pipe(SD3)
    stock, inside = (
        resumed_latents(SD3, pipe, **more),
        sum(6 * start < i < 6 * stop for i in range(6)),
    )
    with patched_guidance(SD3, pipe):
        assert relative(resumed_latents(SD3, pipe, **more), stock) <= 1e-6
        assert pipe._pag_fast.steps[RESUMED] == inside


def test_outside_of_the_window_are_kept_no_rows():
    """Where no such forward follows, nothing is recorded."""
    pipe, recorded = tiny_hosts.build(SD3), []
    more = {"skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.6, "steps": 6}
    record = _CondRecord.note

    def note(self, out):
        recorded.append(1)
        return record(self, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CondRecord, "note", note)
        with patched_guidance(SD3, pipe):
            resumed_latents(SD3, pipe, **more)
            assert pipe._pag_fast.steps[RESUMED] == 2
    assert len(recorded) == 2 * 3, "three blocks in front, in steps 2 and 3"


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_cfg_and_guidance_off(name):
    pipe = resumed_pipe(name)
    off = {"cfg": False} if name == SD3 else _without(name)
    stock = resumed_latents(name, pipe, **off)
    with patched_guidance(name, pipe):
        assert torch.equal(resumed_latents(name, pipe, **off), stock)
        assert not pipe._pag_fast.steps and not pipe._pag_fast.fallbacks


def test_a_prompt_that_a_callback_changes_is_seen():
    """SD3's skip-layer pass goes on with the first prompt: from then on it is not cond's."""
    pipe = resumed_pipe(SD3)

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].roll(1, -1)
        return tensors

    more = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    stock = resumed_latents(SD3, pipe, **more)
    with patched_guidance(SD3, pipe):
        with pytest.warns(UserWarning, match="runs as a whole: it was called with other arguments"):
            patched = resumed_latents(SD3, pipe, **more)
        assert pipe._pag_fast.steps[RESUMED] == 1
    assert relative(patched, stock) <= 1e-6


def test_a_prompt_that_is_changed_in_place_is_seen():
    pipe = resumed_pipe(SD3)

    def callback(pipe, step, timestep, tensors):
        tensors["prompt_embeds"][-1:].mul_(0.5)
        return tensors

    more = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with torch.no_grad():
        stock = resumed_latents(SD3, pipe, **more)
        with patched_guidance(SD3, pipe):
            with pytest.warns(UserWarning, match="other arguments than cond's"):
                assert relative(resumed_latents(SD3, pipe, **more), stock) <= 1e-6
            assert RESUMED not in pipe._pag_fast.steps


# ---- nothing is left, and nothing is kept ----


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_after_an_exception(name, snapshot):
    pipe = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2)
    stock = resumed_latents(name, pipe)
    before = snapshot(pipe)
    pag_fast.patch(pipe, **({"layers": "blocks.1", "pag_scale": 0.0} if name == SD3 else {}))
    patched = resumed_latents(name, pipe)
    for index, wanted in ((4, 2), (1, 2), (4, 4)):  # in a pass that is resumed, and in others
        between, calls = snapshot(pipe), []

        def fail(*_, calls=calls, wanted=wanted):
            calls.append(1)
            if len(calls) == wanted:
                raise ZeroDivisionError

        block = pipe.transformer.transformer_blocks[index]
        handle = block.ff.register_forward_hook(observing(fail))
        with pytest.raises(ZeroDivisionError):
            resumed_latents(name, pipe)
        handle.remove()
        assert snapshot(pipe) == between
    assert torch.equal(resumed_latents(name, pipe), patched)
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(resumed_latents(name, pipe), stock)


@pytest.mark.parametrize("layers", [None, "blocks.2"])
@pytest.mark.parametrize("name", [SD3, LTX2])
def test_what_is_kept_is_freed_within_the_step(name, layers):
    """Of what the last block in front returns, no tensor lives until the step's end."""
    if name == LTX2 and layers:
        pytest.skip("no PAG there")
    pipe, kept = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2), []
    seen = []
    block = pipe.transformer.transformer_blocks[2]

    def callback(pipe, step, timestep, tensors):
        gc.collect()
        seen.append(sum(ref() is not None for ref in kept))
        return tensors

    own = type(block).forward

    def forward(*args, **kwargs):
        out = own(block, *args, **kwargs)
        kept.extend(weakref.ref(x) for x in out)
        return out

    block.forward = row_wise(forward)
    options = {"pag_scale": 3.0} if layers else {}
    with pag_fast.patched(pipe, layers, **options) if layers else patched_guidance(name, pipe):
        resumed_latents(name, pipe, callback_on_step_end=callback)
        assert pipe._pag_fast.steps[RESUMED] == 3
    assert kept and set(seen) == {0}
