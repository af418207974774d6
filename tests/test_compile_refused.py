"""``patch(pipe, compile=...)`` refuses wrong settings, models it cannot compile, no compiler."""

from __future__ import annotations

import pytest
from shallow import build
from tiny import call_kwargs, latents

import pag_fast
from pag_fast import CompileConfig
from pag_fast.runtime.compiled.compilation import _check_compiler

UNET = "StableDiffusionPAGPipeline"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "fast"}, "compile must be True, False or a CompileConfig; got 'fast'"),
        ({"compile": 1}, "compile must be True, False or a CompileConfig; got 1"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(build(UNET), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regional": "yes"}, "regional must be True or False; got 'yes'"),
        ({"backend": "fastest"}, "Unknown backend 'fastest': choose one of .*inductor"),
        ({"cuda_graphs": True, "backend": "eager"}, "cuda_graphs needs backend='inductor'"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        CompileConfig(**options)


def test_models_that_cannot_be_compiled(snapshot):
    pipe = build(UNET)
    pipe.unet.train()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"in training mode and is not compiled: call \.eval\(\)"):
        pag_fast.patch(pipe, compile=True)
    assert snapshot(pipe) == before
    pipe.unet.eval()
    pipe.unet.mid_block._hf_hook = object()
    with pytest.raises(ValueError, match="hooks move or cast the weights of mid_block"):
        pag_fast.patch(pipe, compile=True)
    assert not hasattr(pipe, "_pag_fast")


def test_no_compiler(monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    pipe = pag_fast.patch(build(UNET), compile=True)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and none was found: install"):
        latents(pipe, call_kwargs(UNET, pipe))
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, and the pipeline is on"):
        _check_compiler("cpu", CompileConfig(cuda_graphs=True))
