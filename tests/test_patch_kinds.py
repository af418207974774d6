"""One kind of patch behind another: none, a pipeline's own guidance alone, PAG, Self-Attention."""

from __future__ import annotations

import itertools
import warnings

import pytest
import tiny
import tiny_ltx2
import tiny_sag
import torch
from numerics import relative
from resumed import LTX2, resumed_latents, resumed_pipe

import pag_fast
from pag_fast import PatchConfig
from pag_fast.runtime.compatibility import row_wise
from pag_fast.runtime.stock_passes import RESUMED

LAYERS = ["transformer_blocks.2.attn1"]
UNET = "StableDiffusionPAGPipeline"
# what is put on LTX-2: nothing, its own guidance made fast, PAG beside it
KINDS = {"none": None, "stock": {}, "layers": {"layers": LAYERS}, "other": {"layers": 3}}


@pytest.fixture(autouse=True)
def _rescales():
    """LTX-2 rescales predictions, which is told in every call with PAG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pag_fast: LTX2Pipeline does more", UserWarning)
        yield


def _put(pipe, kind):
    return pag_fast.unpatch(pipe) if kind == "none" else pag_fast.patch(pipe, **KINDS[kind])


def _latents(pipe):
    return resumed_latents(LTX2, pipe, steps=2)


@pytest.fixture(scope="module")
def pictures():
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            pipe = _put(resumed_pipe(LTX2), kind)
            found[kind] = _latents(pipe)
            pag_fast.unpatch(pipe)
    assert relative(found["stock"], found["none"]) < 1e-6
    assert relative(found["layers"], found["none"]) > 1e-3
    assert relative(found["other"], found["layers"]) > 1e-3
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(KINDS, repeat=2)))
def test_one_kind_behind_another(before, after, pictures, snapshot):
    pipe = resumed_pipe(LTX2)
    clean = snapshot(pipe)
    try:
        _put(_put(pipe, before), after)
        assert relative(_latents(pipe), pictures[after]) < 1e-6
        _put(pipe, before)
        if after != "none":
            with pag_fast.patched(pipe, **KINDS[after]):
                pass
        assert relative(_latents(pipe), pictures[before]) < 1e-6
    finally:
        pag_fast.unpatch(pipe)
    assert snapshot(pipe) == clean


@pytest.mark.parametrize("name", [UNET, "StableDiffusionSAGPipeline"])
def test_the_same_kind_twice(name, snapshot):
    pipe = tiny.build(UNET) if name == UNET else tiny_sag.build_sag()

    def draw():
        return (
            tiny.latents(pipe, tiny.call_kwargs(UNET, pipe))
            if name == UNET
            else (tiny_sag.sag_latents(pipe))
        )

    clean, wanted = snapshot(pipe), draw()
    pag_fast.patch(pag_fast.patch(pipe))
    with pag_fast.patched(pipe, strict=True):
        assert relative(draw(), wanted) < 1e-5
    assert relative(draw(), wanted) < 1e-5
    assert snapshot(pag_fast.unpatch(pipe)) == clean


@pytest.mark.parametrize("patched", ["none", "stock", "other"])
def test_verify_goes_by_the_patch_that_is_asked_for(patched):
    pipe = _put(resumed_pipe(LTX2), patched)
    ours = ("generator", "output_type", "return_dict")
    call = {k: v for k, v in tiny_ltx2.call_kwargs(LTX2, steps=2).items() if k not in ours}
    try:
        for more in ({"layers": LAYERS}, {"config": PatchConfig(layers=LAYERS)}):
            found = pag_fast.verify(pipe, **more, **call)
            assert found.ok and found.steps["shared"] == 2
            assert "nothing shared, as the pipeline has no PAG" in found.reference
        found = pag_fast.verify(pipe, config=PatchConfig(), **call)
        assert found.ok and found.reference == "diffusers' own pipeline"
    finally:
        pag_fast.unpatch(pipe)


# ---- what LTX-2 with layers says of itself ----


def test_the_first_call_resumes_its_own_guidance():
    own = tiny_ltx2.build(LTX2)  # nobody has called it yet
    plain = {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "steps": 2}
    with pag_fast.patched(own, LAYERS, strict=True):
        first = resumed_latents(LTX2, own, **plain)
        assert own._pag_fast.steps[RESUMED] == 2 and not own._pag_fast.fallbacks
        assert torch.equal(resumed_latents(LTX2, own, **plain), first)
    with pag_fast.patched(own, LAYERS, share_branches=False):
        assert relative(resumed_latents(LTX2, own, **plain), first) < 1e-6


def test_explain_behind_a_call_says_what_runs():
    pipe = resumed_pipe(LTX2)
    rows = []
    block = pipe.transformer.transformer_blocks[4]
    count = row_wise(lambda module, args, out: rows.append(len(out[0])))
    hook = block.register_forward_hook(count)
    try:
        with pag_fast.patched(pipe, LAYERS):
            _latents(pipe)
            seen = pipe._pag_fast.seen_of_loop["branches"]
            calls = pag_fast.explain(pipe, flops=False).calls
    finally:
        hook.remove()
    assert seen == "together in one forward, uncond, cond"
    with_cfg = [call for call in calls if call.cfg]
    assert [call.stock for call in with_cfg] == [max(rows)] == [3]


def test_layers_of_a_pipeline_that_has_none_of_its_own():
    pipe = resumed_pipe(LTX2)
    with pag_fast.patched(pipe, LAYERS):
        _latents(pipe)
        wanted = [layer.name for layer in pag_fast.layer_costs(pipe).layers]
    found = pag_fast.layer_costs(pipe)
    assert [layer.name for layer in found.layers] == wanted and found.default_over_cfg is None
    assert LAYERS[0] in wanted
    with pytest.raises(ValueError, match="gets PAG on layers that are named, and the published"):
        pag_fast.layer_costs(LTX2)
