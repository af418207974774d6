"""``torch.compile``: every patched denoiser in one graph, and no second one without a reason."""

from __future__ import annotations

import pytest
import torch
from numerics import relative
from shallow import LAYERS, build, least
from tiny import PIPELINES, call_kwargs, latents
from torch._dynamo.testing import CompileCounterWithBackend

import pag_fast

UNET, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"


def _build(name, layers):
    if layers == "least":
        return least(name)[0]
    return build(name, pag_applied_layers=LAYERS[name][layers])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(pipe, name, backend="eager"):
    counter, part = CompileCounterWithBackend(backend), PIPELINES[name].denoiser
    compiled = torch.compile(getattr(pipe, part), fullgraph=True, backend=counter)
    setattr(pipe, part, compiled)
    return counter


# functionalisation has to cope with the op that writes in place: of one stream and of two, and of
# linear attention; a fork with nothing behind it in a UNet and a transformer
@pytest.mark.parametrize(
    ("name", "layers", "backend"),
    [
        (UNET, "least", "aot_eager"),
        (SD3, "middle", "aot_eager"),
        (SD3, "last", "eager"),
        ("SanaPAGPipeline", "least", "aot_eager"),
        ("StableDiffusionXLPAGPipeline", "middle", "eager"),
        ("AnimateDiffPAGPipeline", "least", "eager"),
        ("HunyuanDiTPAGPipeline", "least", "eager"),
        ("PixArtSigmaPAGPipeline", "least", "eager"),
    ],
)
def test_one_graph_for_all_steps_scales_prompts_and_calls(name, layers, backend):
    pipe = _build(name, layers)
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    counter = _compile(pipe, name, backend=backend)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    changes = {"seed": 1, "pag_scale": 1.5, "guidance_scale": 3.0, "steps": 3}
    latents(pipe, call_kwargs(name, pipe, **changes))
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    assert counter.frame_count == 1


# CFG on has a graph of every family in the test before; a transformer turns it on and off, and
# those that call their model in a way of their own have it off
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (name, [(cfg, adaptive) for cfg in cfgs for adaptive in adaptives])
        for name, cfgs, adaptives in [
            # test_compiling.py has the dropped branch of a UNet
            (UNET, (False,), (0.0,)),
            (SD3, (True, False), (0.0, 0.5)),
            # a branch is dropped by its rows, whoever the model is
            ("HunyuanDiTPAGPipeline", (False,), (0.0,)),
            ("SanaPAGPipeline", (False,), (0.0, 0.5)),
            # stock has nothing to compare an adaptive scale with
            ("PixArtSigmaPAGPipeline", (False,), (0.0,)),
        ]
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_graph_each_for_cfg_on_off_and_the_dropped_branch(name, settings):
    pipe, _ = least(name)
    pag_fast.patch(pipe)
    counter = _compile(pipe, name)
    expected = {}
    for _ in range(2):
        for cfg, adaptive in settings:
            kwargs = {"cfg": cfg, "pag_adaptive_scale": adaptive, "steps": 3}
            out = latents(pipe, call_kwargs(name, pipe, **kwargs))
            expected.setdefault((cfg, adaptive), []).append(out)
        if len(next(iter(expected.values()))) == 1:
            first = counter.frame_count
    assert counter.frame_count == first <= len(settings)
    pag_fast.unpatch(pipe)
    setattr(pipe, PIPELINES[name].denoiser, getattr(pipe, PIPELINES[name].denoiser)._orig_mod)
    for (cfg, adaptive), outs in expected.items():
        kwargs = {"cfg": cfg, "pag_adaptive_scale": adaptive, "steps": 3}
        stock = latents(pipe, call_kwargs(name, pipe, **kwargs))
        assert all(relative(out, stock) < 1e-5 for out in outs)


# test_compile_turns.py has it in place
def test_compiled_before_patching():
    """A denoiser that has already run compiled, stock: its graphs must not be used for ours."""
    name = SD3
    pipe, _ = least(name)
    counter = _compile(pipe, name)
    stock = latents(pipe, call_kwargs(name, pipe))
    assert counter.frame_count == 1
    pag_fast.patch(pipe)
    patched = latents(pipe, call_kwargs(name, pipe))
    assert relative(patched, stock) < 1e-5
    assert dict(pipe._pag_fast.steps) == {"shared": 2}
    assert counter.frame_count == 2
    pag_fast.unpatch(pipe)
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)
    # the same rows, without PAG and with it: neither takes the other's graph
    pag_fast.patch(pipe)
    plain = latents(pipe, call_kwargs(name, pipe, batch=3, cfg=False, pag_scale=0.0))
    pag_fast.unpatch(pipe)
    again = latents(pipe, call_kwargs(name, pipe, batch=3, cfg=False, pag_scale=0.0))
    assert torch.equal(plain, again)


def test_other_settings_are_other_graphs():
    """Layers and sharing are baked into a graph; changing them must not run an old one."""
    name = SD3
    pipe = build(name, num_layers=2)
    pictures = {}
    for layers in ("blocks.0", "blocks.1"):
        pipe.pag_applied_layers = [layers]
        pictures[layers] = latents(pipe, call_kwargs(name, pipe))
    _compile(pipe, name)
    for layers, share in (("0", True), ("1", True), ("1", False), ("0", True)):
        pag_fast.patch(pipe, f"blocks.{layers}", share_branches=share)
        stock = pictures[f"blocks.{layers}"]
        assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5


def test_compiled_forward():
    """Compiled behind the module's back: nothing is kept from step to step, and it is one graph."""
    name = UNET
    pipe, _ = least(name)
    stock = latents(pipe, call_kwargs(name, pipe, steps=3))
    pag_fast.patch(pipe)
    counter = CompileCounterWithBackend("eager")
    pipe.unet.forward = torch.compile(pipe.unet.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        assert relative(latents(pipe, call_kwargs(name, pipe, steps=3)), stock) < 1e-5
    assert counter.frame_count == 1


@torch.backends.mkldnn.flags(enabled=True)  # as users have it
def test_inductor():
    """Of a transformer; ``test_compiling.py`` has a UNet."""
    name = SD3
    pipe, _ = least(name)
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    _compile(pipe, name, backend="inductor")
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5


def test_anchored_names_match_a_compiled_denoiser():
    """Under torch.compile stock sees names with a prefix, and ``^transformer`` matches nothing."""
    name = SD3
    pipe = build(name, num_layers=1, pag_applied_layers=["^transformer_blocks.0"])
    stock = latents(pipe, call_kwargs(name, pipe))
    _compile(pipe, name)
    with pytest.raises(ValueError, match="Cannot find PAG layer"):
        latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
