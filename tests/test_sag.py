"""``StableDiffusionSAGPipeline`` patched: stock's picture without the map, in fewer launches."""

from __future__ import annotations

import diffusers
import pytest
import torch
from numerics import observing, relative
from test_received_attention import Shapes
from tiny_sag import ATTENTION, DDIM, Injected, add_lora, build_sag, sag_latents

import pag_fast
from pag_fast.analysis.kernel_counts import Launches, counted

# ---- parity ----


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_parity(kind, cfg, batch):
    pipe = build_sag(DDIM(clip_sample=False, prediction_type=kind))
    stock = sag_latents(pipe, batch, cfg)
    plain = sag_latents(pipe, batch, cfg, sag_scale=0.0)
    assert relative(plain, stock) > 1e-2
    pag_fast.patch(pipe)
    first = sag_latents(pipe, batch, cfg)
    assert relative(first, stock) < 1e-5
    assert torch.equal(sag_latents(pipe, batch, cfg), first)
    assert relative(sag_latents(pipe, batch, cfg, sag_scale=0.0), plain) < 1e-5
    assert dict(pipe._pag_fast.steps) == {"guided passes": 6, "degraded passes": 4}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.PNDMScheduler(skip_prk_steps=True),
        diffusers.UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers(scheduler):
    pipe = build_sag(scheduler)
    stock = sag_latents(pipe)
    assert relative(sag_latents(pag_fast.patch(pipe)), stock) < 1e-5


@pytest.mark.parametrize("size", [(40, 72), (64, 32)])
def test_sizes(size):
    """Maps that latents are no multiple of."""
    pipe = build_sag(whole=True)
    kwargs = {"height": size[0], "width": size[1]}
    stock = sag_latents(pipe, **kwargs)
    assert relative(sag_latents(pag_fast.patch(pipe), **kwargs), stock) < 1e-5


@pytest.mark.parametrize("options", [{"cache_conditioning": False}, {"fewer_launches": False}])
def test_options(options):
    pipe = build_sag()
    stock = sag_latents(pipe)
    assert relative(sag_latents(pag_fast.patch(pipe, **options)), stock) < 1e-5


def test_triton_backend(monkeypatch):
    pytest.importorskip("triton")
    pipe = build_sag()
    kwargs = {"num_inference_steps": 1}
    stock = sag_latents(pipe, **kwargs)
    assert relative(sag_latents(pag_fast.patch(pipe, backend="triton"), **kwargs), stock) < 1e-5


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_lora_scale_reaches_the_guided_pass_alone(cfg):
    """As in stock: then the two passes cannot have text keys in common."""
    pipe = build_sag()
    add_lora(pipe)
    kwargs = {"cfg": cfg, "cross_attention_kwargs": {"scale": 0.3}}
    stock = sag_latents(pipe, **kwargs)
    assert relative(sag_latents(pipe, cfg=cfg), stock) > 1e-3
    pag_fast.patch(pipe)
    assert relative(sag_latents(pipe, **kwargs), stock) < 1e-5


# ---- what is no longer done ----


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_no_attention_map(backend):
    def maps(pipe):
        with Shapes() as shapes:
            sag_latents(pipe, num_inference_steps=1, height=64, width=80)
        # 8 × 10 of 32 × 40 latents
        return shapes.has_map(80)

    pipe = build_sag(whole=True)
    assert maps(pipe)
    assert not maps(pag_fast.patch(pipe, backend=backend))


def _launches_of(pipe, steps, **kwargs):
    with counted() as found:
        sag_latents(pipe, num_inference_steps=steps, **kwargs)
    return found.total


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_fewer_launches_a_step(cfg):
    pipe = build_sag()

    def step(**kwargs):
        # a step in the middle of a call
        more, fewer = (_launches_of(pipe, steps, cfg=cfg, **kwargs) for steps in (3, 2))
        return more - fewer

    stock, without = step(), step(sag_scale=0.0)
    pag_fast.patch(pipe)
    sag_latents(pipe, cfg=cfg)  # weights are packed in the first forward
    patched, patched_without = step(), step(sag_scale=0.0)
    print(f"a step: {stock} stock, {patched} patched; without: {without}, {patched_without}")
    assert patched < 0.8 * stock
    assert patched_without < 0.85 * without


def test_launches_of_the_degradation():
    """Between the two passes of a step."""
    pipe = build_sag()

    def between():
        counter, passes = Launches(), []

        def before(*_):
            passes.append(0)
            if len(passes) == 4:  # the degraded pass of the second step
                counter.__exit__(None, None, None)

        def after(*_):
            if len(passes) == 3:
                counter.__enter__()

        unet = pipe.unet
        handles = [
            unet.register_forward_pre_hook(observing(before)),
            unet.register_forward_hook(observing(after)),
        ]
        sag_latents(pipe)
        for handle in handles:
            handle.remove()
        return counter.total

    stock = between()
    pag_fast.patch(pipe)
    patched = between()
    print(f"stock {stock}, patched {patched}")
    # the combination of CFG (3), reading the timestep, which on the CPU is an op, and our ops (13)
    assert stock > 35 and patched == 17


def test_text_keys_once_a_call_for_both_passes():
    pipe, calls = build_sag(), []
    key = pipe.unet.get_submodule(ATTENTION.replace("attn1", "attn2")).to_k
    run = key.forward

    def counted(x):
        calls.append(x.shape[0])
        return run(x)

    key.forward = observing(counted)
    sag_latents(pipe, num_inference_steps=3)
    assert calls == [2, 1] * 3
    pag_fast.patch(pipe)
    for _ in range(2):
        calls.clear()
        sag_latents(pipe, num_inference_steps=3)
        assert calls == [2]


def test_the_timestep_is_embedded_once_a_step():
    pipe, calls = build_sag(), []
    embedding = pipe.unet.time_embedding
    handle = embedding.linear_1.register_forward_hook(observing(lambda *_: calls.append(0)))
    sag_latents(pipe, num_inference_steps=3)
    assert len(calls) == 6
    pag_fast.patch(pipe)
    calls.clear()
    sag_latents(pipe, num_inference_steps=3)
    assert len(calls) == 3
    handle.remove()


def test_nothing_is_kept_after_the_last_pass():
    pipe = pag_fast.patch(build_sag())
    held = []

    def decode(*args, **kwargs):
        session = pipe._pag_fast.session
        shared = session._shared
        everything = [*shared.kept.invariants, *shared.timed.invariants]
        held.extend(x.kept for x in everything)
        raise Injected

    pipe.vae.decode = decode
    for scale in (0.75, 0.0):
        with pytest.raises(Injected):
            sag_latents(pipe, output_type="pt", sag_scale=scale)
    assert held and not any(held)
