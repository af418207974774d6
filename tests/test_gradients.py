"""Gradients through whole calls: of prompts, latents and adapters, as stock or slow PAG has them.

Whoever optimises prompts or trains on rewards runs what diffusers has decorated with ``no_grad``.
"""

from __future__ import annotations

import contextlib
import inspect

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from tiny_hosts.reference import slow_pag
from torch.utils.flop_counter import FlopCounterMode

import pag_fast
from pag_fast import ops
from pag_fast.models.layer_names import resolve

SD, XL, SD3 = (f"StableDiffusion{x}PAGPipeline" for x in ("", "XL", "3"))
SANA, HUNYUAN = "SanaPAGPipeline", "HunyuanDiTPAGPipeline"
HOST, FLUX, WAN = "StableDiffusionPipeline", "FluxPipeline", "WanPipeline"


def _module(name):
    return tiny_hosts if name in tiny_hosts.HOSTS else tiny


def _built(name, adapter):
    torch.manual_seed(0)
    pipe = _module(name).build(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    model.requires_grad_(False)
    if adapter:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        chosen = {"r": 2, "target_modules": ["to_k", "to_v", "to_q"], "init_lora_weights": False}
        model.add_adapter(peft.LoraConfig(**chosen))
    return pipe, [p for p in model.parameters() if p.requires_grad]


def _slow(pipe, name, kwargs):
    """PAG as stock has it, or by separate forwards."""
    if name not in tiny_hosts.HOSTS:
        return contextlib.nullcontext()
    spec, model = tiny_hosts.HOSTS[name], getattr(pipe, "unet", None) or pipe.transformer
    layers = list(resolve(model, spec.layers["middle"]).values())
    return slow_pag(pipe, name, layers, 3.0, spec.cfg_scale(kwargs))


def _gradients(name, patched, *, adapter=False, around=contextlib.nullcontext, **options):
    """Gradients of the picture's mean square, flat, and the picture."""
    pipe, parameters = _built(name, adapter)
    kwargs = _module(name).call_kwargs(name, pipe, steps=3)
    prompt = kwargs["prompt_embeds"].requires_grad_(True)
    how = _slow(pipe, name, kwargs)
    if patched:
        layers = tiny_hosts.HOSTS[name].layers["middle"] if name in tiny_hosts.HOSTS else None
        pag_fast.patch(pipe, layers, **options)
        how = contextlib.nullcontext()
    with torch.enable_grad(), how, around():
        out = type(pipe).__call__.__wrapped__(pipe, **kwargs)[0]
        out.square().mean().backward()
    parts = [x.grad.flatten() for x in (prompt, *parameters)]
    return torch.cat(parts), out.detach()


def _check(name, adapter=False, around=contextlib.nullcontext, **options):
    stock, picture = _gradients(name, False, adapter=adapter)
    ours, ours_picture = _gradients(name, True, adapter=adapter, around=around, **options)
    assert stock.norm() > 0
    assert relative(ours, stock) < 1e-4
    assert relative(ours_picture, picture) < 1e-5


@pytest.mark.parametrize("name", [SD, XL, SD3, SANA, HUNYUAN, HOST, FLUX, WAN])
def test_of_prompts(name):
    _check(name)


@pytest.mark.parametrize("name", [SD, SD3, SANA, HOST, FLUX])
def test_of_adapters(name):
    _check(name, adapter=True)


@pytest.mark.parametrize("name", [SD, SD3, FLUX])
def test_under_dispatch_modes(name):
    _check(name, around=lambda: FlopCounterMode(display=False))


@pytest.mark.parametrize("name", [HOST, WAN])
def test_where_nobody_looks_at_versions(name):
    """Saved tensors are not checked for writes there, and gradients would be silently wrong."""
    _check(name, around=torch.autograd.graph.save_on_cpu)


@pytest.mark.skipif(not pag_fast.ops.backend._installed(), reason="without kernels")
@pytest.mark.parametrize("name", [SD, HOST, FLUX, HUNYUAN])
def test_kernels_have_no_derivative(name):
    _check(name, backend="triton")


@pytest.mark.skipif(not pag_fast.ops.backend._installed(), reason="without kernels")
@pytest.mark.parametrize("part", ["to_q", "to_k", "norm_q", "norm_k"])
def test_of_one_weight_alone(part):
    """The key or a norm may be all that is differentiated of what a kernel writes in place."""

    def run(patched):
        pipe, _ = _built(HUNYUAN, False)
        named = pipe.transformer.named_parameters()
        weights = [p for name, p in named if f"attn1.{part}." in name]
        for p in weights:
            p.requires_grad_(True)
        if patched:
            pag_fast.patch(pipe, backend="triton")
        kwargs = tiny.call_kwargs(HUNYUAN, pipe, steps=2)
        with torch.enable_grad():
            type(pipe).__call__.__wrapped__(pipe, **kwargs)[0].square().mean().backward()
        return torch.cat([p.grad.flatten() for p in weights])

    stock = run(False)
    assert stock.norm() > 0
    assert relative(run(True), stock) < 1e-4


def test_compiled():
    # traced, and differentiated by the compiler
    _check(SD3, compile=pag_fast.CompileConfig(backend="aot_eager"))


@pytest.mark.parametrize("name", [SD, SD3, FLUX])
def test_a_way_back_in_every_step(name):
    """Nothing that is kept has a graph: it would be gone through a second time."""

    def run(patched):
        pipe, _ = _built(name, False)
        kwargs = _module(name).call_kwargs(name, pipe, steps=3)
        prompt = kwargs["prompt_embeds"].requires_grad_(True)

        def back(pipe, step, timestep, tensors):
            tensors["latents"].square().mean().backward()
            return {"latents": tensors["latents"].detach()}

        how = _slow(pipe, name, kwargs)
        if patched:
            layers = tiny_hosts.HOSTS[name].layers["middle"] if name in tiny_hosts.HOSTS else None
            pag_fast.patch(pipe, layers)
            how = contextlib.nullcontext()
        with torch.enable_grad(), how:
            type(pipe).__call__.__wrapped__(pipe, callback_on_step_end=back, **kwargs)
        return prompt.grad

    assert relative(run(True), run(False)) < 1e-4


@pytest.mark.parametrize("name", [SD, SD3])
def test_checkpointing_is_refused_in_eval_mode_too(name):
    pipe, _ = _built(name, True)
    (getattr(pipe, "unet", None) or pipe.transformer).enable_gradient_checkpointing()
    pag_fast.patch(pipe)
    kwargs = tiny.call_kwargs(name, pipe, steps=2)
    with torch.enable_grad(), pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        type(pipe).__call__.__wrapped__(pipe, **kwargs)
    # and nothing is computed twice without gradients
    tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=2))


def _in_training(name):
    """As a training script validates: adapters, training mode, checkpointing, gradients on."""
    pipe, _ = _built(name, True)
    for model in (getattr(pipe, "unet", None) or pipe.transformer, getattr(pipe, "controlnet", 0)):
        if model:
            model.train()
            model.enable_gradient_checkpointing()
    return pipe


NETS = "StableDiffusionControlNetPipeline"


@pytest.mark.parametrize("name", [HOST, FLUX, WAN, "QwenImagePipeline", "LTXPipeline", NETS])
def test_a_pipeline_that_turns_gradients_off_may_checkpoint(name):
    """Without PAG of its own, a session begins before the call has turned them off."""
    pipe, _ = _built(name, True)
    kwargs, layers = tiny_hosts.call_kwargs(name, pipe), tiny_hosts.HOSTS[name].layers["middle"]
    plain = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe))
    with _slow(pipe, name, kwargs):
        truth = tiny_hosts.latents(pipe, kwargs)
    pipe = pag_fast.patch(_in_training(name), layers)
    with torch.enable_grad():
        found = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe))
        assert relative(found, truth) < 1e-5 < relative(truth, plain)
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            type(pipe).__call__.__wrapped__(pipe, **tiny_hosts.call_kwargs(name, pipe))
        # and the call that follows is as good as the first
        again = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe))
    assert relative(again, truth) < 1e-5


def test_gradients_that_a_callback_turns_on_are_refused_with_checkpointing():
    pipe = pag_fast.patch(_in_training(HOST), tiny_hosts.HOSTS[HOST].layers["middle"])
    seen = []

    def on(pipe, step, timestep, kwargs):
        seen.append(step)
        torch.set_grad_enabled(True)
        return {}

    kwargs = tiny_hosts.call_kwargs(HOST, pipe, steps=3)
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        pipe(**kwargs, callback_on_step_end=on)
    assert seen == [0]


# ---- the ops ----


def _inputs(rows=3, tokens=20):
    torch.manual_seed(3)
    return [torch.randn(rows, tokens, 2, 8).double().requires_grad_(True) for _ in range(3)]


CALLS = {
    "identity": lambda q, k, v: ops.perturbed_attention(q[:2], k[:2], v, num_attend=2),
    "in place": lambda q, k, v: ops.perturbed_attention_(q[:2], k[:2], v * 1.0, num_attend=2),
    "fork": lambda q, k, v: ops.perturbed_attention(q, k, v, num_attend=3, num_forked=1),
    "text": lambda q, k, v: ops.perturbed_attention(q, k, v, num_attend=2, num_context=6),
    "text in place": lambda q, k, v: ops.perturbed_attention_(
        q, k, v * 1.0, num_attend=2, num_context=6
    ),
    "blur": lambda q, k, v: ops.perturbed_attention(q, k, v, num_attend=2, perturbation="blur"),
    "linear": lambda q, k, v: ops.linear_attention(q[:2], k[:2], v, num_attend=2),
    "noise": lambda q, k, v: ops.noisy_attention(q, k, v, clock=torch.ones(1, dtype=torch.int64)),
    "received": lambda q, k, v: ops.received_attention(q, k) * v.sum((2, 3)),
    "guidance": lambda q, k, v: ops.combine_guidance(
        q, k, v, guidance_scale=5.0, pag_scale=3.0, rescale=0.7
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_op_has_the_right_derivative(name):
    assert torch.autograd.gradcheck(CALLS[name], _inputs(), fast_mode=True)


# ---- past the patched call ----


@pytest.mark.parametrize("name", [HOST, FLUX])
def test_a_call_past_ours_is_told(name):
    pipe = tiny_hosts.build(name)
    layers, base = tiny_hosts.HOSTS[name].layers["middle"], type(pipe)
    with pag_fast.patched(pipe, layers):
        inside = type(pipe).__call__.__wrapped__(pipe, **tiny_hosts.call_kwargs(name, pipe))[0]
        wanted = pipe(**tiny_hosts.call_kwargs(name, pipe))[0]
        assert relative(inside, wanted) < 1e-5
        with pytest.warns(UserWarning, match="past the patched pipeline's own"):
            base.__call__(pipe, **tiny_hosts.call_kwargs(name, pipe))
        # a scale of zero, a stock sibling and the model by itself are nobody's concern
        pipe._pag_fast.fallbacks.clear()
        pipe(**tiny_hosts.call_kwargs(name, pipe), pag_scale=0.0)
        sibling = base(**pipe.components)
        sibling.set_progress_bar_config(disable=True)
        sibling(**tiny_hosts.call_kwargs(name, sibling))
        assert not pipe._pag_fast.fallbacks
    with (
        pag_fast.patched(pipe, layers, strict=True),
        pytest.raises(ValueError, match="past the patched pipeline's own"),
    ):
        inspect.unwrap(base.__call__)(pipe, **tiny_hosts.call_kwargs(name, pipe))


def test_a_pag_pipeline_guides_by_itself():
    pipe = tiny.build(SD)
    stock = tiny.latents(pipe, tiny.call_kwargs(SD, pipe))
    base = type(pipe)
    pag_fast.patch(pipe, strict=True)
    assert relative(base.__call__(pipe, **tiny.call_kwargs(SD, pipe))[0], stock) < 1e-5
