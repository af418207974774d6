"""Packages that others wrote to make denoisers faster, on top of which a patched pipeline runs.

Each makes a picture of its own; with PAG it has to be the one that stock PAG makes with it, or that
of a patched pipeline which shares nothing. constraints/addons.txt names the versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative as relative_error

import pag_fast
from pag_fast.runtime.compatibility import UNKNOWN, Compatibility, look

UNETS = ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"]
STEPS = 4
# fp32, another order of additions
CLOSE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:pag_fast")


def merging(pipe: Any) -> None:
    """Token merging: blocks get classes of their own, and a hook reads the latents' size."""
    tomesd = pytest.importorskip("tomesd")
    torch.manual_seed(3)  # of the tokens that are merged into
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=8)


def deep_cache(pipe: Any) -> None:
    """DeepCache: forwards of blocks return what they returned in the step before."""
    helpers = pytest.importorskip("DeepCache")
    helper = helpers.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


ADDONS = {"tomesd": merging, "DeepCache": deep_cache}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    state = torch.get_rng_state()
    with torch.no_grad():
        yield
    torch.set_rng_state(state)


def _run(name: str, addon: Callable[[Any], None] | None, patch: bool, **options: Any) -> Any:
    pipe = tiny.build(name)
    if addon is not None:
        addon(pipe)
    if patch:
        pag_fast.patch(pipe, **options)
    return tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=STEPS))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("addon", ADDONS)
def test_is_found(addon: str, name: str) -> None:
    pipe, watch = tiny.build(name), Compatibility()
    assert watch.look(pipe.unet) == ()
    ADDONS[addon](pipe)
    findings = look(pipe.unet)
    assert findings and all(addon in f.what for f in findings)
    # hooks of the model itself see every row: what they hand on is compared again
    inside = [f for f in findings if not f.what.endswith(" the model")]
    assert inside and all(f.answer == UNKNOWN for f in inside)
    assert watch.look(pipe.unet) == findings


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("addon", ADDONS)
def test_picture_is_that_of_stock_pag_with_it(addon: str, name: str) -> None:
    stock = _run(name, ADDONS[addon], patch=False)
    assert relative_error(_run(name, None, patch=False), stock) > 1e-3  # it does something
    assert relative_error(_run(name, ADDONS[addon], patch=True), stock) < CLOSE


@pytest.mark.parametrize("addon", ADDONS)
def test_picture_with_an_adaptive_scale(addon: str) -> None:
    """Steps without PAG run every row, as what the add-on stores is of every row."""
    name = UNETS[0]

    def run(patch: bool) -> Any:
        pipe = tiny.build(name)
        ADDONS[addon](pipe)
        if patch:
            pag_fast.patch(pipe)
        kwargs = tiny.call_kwargs(name, pipe, steps=STEPS)
        return tiny.latents(pipe, {**kwargs, "pag_adaptive_scale": 0.004})

    assert relative_error(run(True), run(False)) < CLOSE


@pytest.mark.parametrize("addon", ADDONS)
def test_put_on_and_taken_off_a_patched_pipeline(addon: str) -> None:
    name = UNETS[0]
    pipe = pag_fast.patch(tiny.build(name))

    def run() -> Any:
        return tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=STEPS))

    without = run()
    if addon == "tomesd":
        merging(pipe)
    else:
        helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
    assert relative_error(run(), _run(name, ADDONS[addon], patch=False)) < CLOSE
    if addon == "tomesd":
        pytest.importorskip("tomesd").remove_patch(pipe)
    else:
        helper.disable()
    assert relative_error(run(), without) < CLOSE


# ---- T-GATE: attentions whose forward knows no processors ----


def _gate(pipe: Any) -> None:
    utils = pytest.importorskip("tgate.tgate_utils")
    off = {"cache": False, "reuse": False}
    utils.register_forward(
        pipe.unet, "Attention", ca_kward=dict(off), sa_kward=dict(off), keep_shape=True
    )


def test_attention_that_runs_no_processor_is_noticed() -> None:
    """Its forwards stay on the model behind its own pipeline's call, and compute no PAG at all."""
    pipe = tiny.build(UNETS[0])
    _gate(pipe)
    findings = look(pipe.unet)
    assert findings and all(f.answer == UNKNOWN and "tgate" in f.what for f in findings)
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="tgate"):
        tiny.latents(pipe, tiny.call_kwargs(UNETS[0], pipe, steps=STEPS))
    pag_fast.patch(pipe, strict=True)
    with pytest.raises(ValueError, match="tgate"):
        tiny.latents(pipe, tiny.call_kwargs(UNETS[0], pipe, steps=STEPS))


# ---- cache-dit: the transformer's forward, and its blocks while it runs ----


@contextlib.contextmanager
def _cached(pipe: Any, **options: Any) -> Iterator[None]:
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        max_warmup_steps=1,
        residual_diff_threshold=10.0,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        enable_separate_cfg=True,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield
    finally:
        # it deletes what it has put on the pipeline's class
        with contextlib.suppress(ValueError):
            pag_fast.unpatch(pipe)
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
def test_cached_blocks_are_found_and_run_unshared(name: str) -> None:
    def run(cached: bool, **options: Any) -> Any:
        pipe = tiny_hosts.build(name)
        with _cached(pipe) if cached else contextlib.nullcontext():
            findings = look(pipe.transformer)
            assert bool(findings) is cached
            assert all(f.answer == UNKNOWN and "cache_dit" in f.what for f in findings)
            pag_fast.patch(pipe, tiny_hosts.HOSTS[name].layers["middle"], pag_scale=2.0, **options)
            return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, steps=6))

    unshared = run(True, share_branches=False)
    assert relative_error(run(False), unshared) > 1e-3
    assert relative_error(run(True), unshared) < CLOSE
