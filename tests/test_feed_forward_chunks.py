"""Feed-forward layers in chunks, whose size has to divide what there is."""

from __future__ import annotations

import warnings

import pytest
from numerics import relative
from tiny import build, call_kwargs, latents

import pag_fast

MOTION = "AnimateDiffPAGPipeline"


def _blocks(model):
    return [module for module in model.modules() if hasattr(module, "set_chunk_feed_forward")]


def _chunked(model, size, dim):
    blocks = [block for block in _blocks(model) if hasattr(block, "_chunk_size")]
    assert blocks
    for block in blocks:
        block.set_chunk_feed_forward(size, dim)


@pytest.mark.parametrize(
    ("name", "size", "dim", "apart"),
    [
        (MOTION, 3, 0, True),  # three branches of two frames
        (MOTION, 1, 0, False),
        (MOTION, 2, 1, False),
        ("StableDiffusionPAGPipeline", 3, 0, True),
        ("StableDiffusionXLPAGPipeline", 2, 1, False),
    ],
)
def test_chunks_of_rows_have_all_rows(name, size, dim, apart):
    pipe = build(name)
    expected = latents(pipe, call_kwargs(name, pipe))
    _chunked(pipe.unet, size, dim)
    assert relative(latents(pipe, call_kwargs(name, pipe)), expected) < 1e-5
    _chunked(pipe.unet, None, 0)
    pag_fast.patch(pipe)
    assert relative(latents(pipe, call_kwargs(name, pipe)), expected) < 1e-5
    # between two calls, and off again
    for size_, dim_, warned in ((size, dim, apart), (None, 0, False)):
        _chunked(pipe.unet, size_, dim_)
        pipe._pag_fast.steps.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert relative(latents(pipe, call_kwargs(name, pipe)), expected) < 1e-5
        said = [str(w.message) for w in told if "pag_fast" in str(w.message)]
        assert any("chunks of rows" in text for text in said) == warned, said
        assert ("shared" in pipe._pag_fast.steps) != warned
