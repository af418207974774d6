"""Every pipeline patched against stock: the same picture, and nothing left behind."""

from __future__ import annotations

import functools

import older
import pytest
import shallow
import torch
from numerics import relative
from tiny import FAMILIES, PIPELINES, build, call_kwargs, every, latents

import pag_fast

CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])


def _shallow(name, layers, **options):
    sets = {**PIPELINES[name].layers, **shallow.LAYERS[shallow.family(name)]}
    return shallow.build(name, pag_applied_layers=sets[layers], **options)


@functools.lru_cache(maxsize=2)
def _pipe(name, layers):
    """One of each family as it is; those whose loops alone differ have fewer layers."""
    if name in FAMILIES:
        return build(name, pag_applied_layers=PIPELINES[name].layers[layers])
    return _shallow(name, layers)


@pytest.mark.parametrize(
    ("name", "layers", "cfg", "batch"),
    every(
        [("default", True, 1), ("default", False, 2), ("middle", True, 2)],
        [("middle", False, 1), ("last", True, 1), ("all", False, 2)],
    ),
)
def test_patched_equals_stock(name, layers, cfg, batch):
    pipe = _pipe(name, layers)

    def run():
        return latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=cfg))

    stock = run()
    with pag_fast.patched(pipe):
        patched = run()
        assert dict(pipe._pag_fast.steps) == {"shared": 2}, "the branches were not shared"
        assert not pipe._pag_fast.fallbacks
        if layers == "middle":
            assert torch.equal(run(), patched), "a second call gives another picture"
    assert relative(patched, stock) < 1e-5
    if layers == "middle":
        assert torch.equal(run(), stock), "unpatching changed the picture"


# test_tiny.py shows it for one of each family
@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in FAMILIES])
def test_perturbing_matters(name):
    """Otherwise the comparisons above would hold for a patch that drops the perturbed branch."""
    pipe = _pipe(name, "default")
    without = latents(pipe, call_kwargs(name, pipe, pag_scale=0.0))
    for layers in ("default", "middle"):
        pipe = _pipe(name, layers)
        with_pag = latents(pipe, call_kwargs(name, pipe))
        assert relative(with_pag, without) > 1e-3


@older.SAME_NOISE
@pytest.mark.parametrize(("name", "cfg"), every([(True,)], [(False,)]))
def test_bfloat16_errs_no_more_than_stock(name, cfg):
    def run(dtype, patch=False):
        pipe = _shallow(name, "middle", dtype=dtype)
        if patch:
            pag_fast.patch(pipe)
        return latents(pipe, call_kwargs(name, pipe, cfg=cfg)).float()

    truth = run(torch.float32)
    stock, patched = run(torch.bfloat16), run(torch.bfloat16, patch=True)
    assert relative(patched, truth) <= 2 * relative(stock, truth)
    assert 1e-4 < relative(stock, truth) < 0.2


@pytest.mark.parametrize("name", PIPELINES)
def test_unshared_branches_equal_stock_too(name):
    pipe = _shallow(name, "middle")
    stock = latents(pipe, call_kwargs(name, pipe))
    with pag_fast.patched(pipe, share_branches=False):
        patched = latents(pipe, call_kwargs(name, pipe))
        assert dict(pipe._pag_fast.steps) == {"not shared": 2}
    assert relative(patched, stock) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
def test_unpatch_restores_the_same_objects(name, snapshot):
    pipe = _shallow(name, "default")
    before = snapshot(pipe)
    pag_fast.patch(pipe, PIPELINES[name].layers["all"])
    latents(pipe, call_kwargs(name, pipe))
    # between calls only the pipeline itself knows that it is patched
    models = {k: v for k, v in snapshot(pipe).items() if isinstance(k, tuple)}
    assert models == {k: v for k, v in before.items() if isinstance(k, tuple)}
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before


# stock repeats the embeddings it makes itself, but in these pipelines not those it is given
_NO_REPEAT = ("KolorsPAGPipeline", "StableDiffusion3", "HunyuanDiTPAGPipeline")


@pytest.mark.parametrize("name", [n for n in PIPELINES if not n.startswith(_NO_REPEAT)])
def test_several_images_per_prompt(name):
    number = "num_videos_per_prompt" if name.startswith("AnimateDiff") else "num_images_per_prompt"
    pipe = _shallow(name, "middle")
    stock = latents(pipe, call_kwargs(name, pipe, **{number: 2}))
    with pag_fast.patched(pipe):
        patched = latents(pipe, call_kwargs(name, pipe, **{number: 2}))
    assert relative(patched, stock) < 1e-5
