"""Forward-mode derivatives of whole calls as stock or slow PAG has them; torch.func is refused."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from tiny_hosts.reference import slow_pag
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import pag_fast
from pag_fast.models.layer_names import resolve

SD, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
SANA, HUNYUAN = "SanaPAGPipeline", "HunyuanDiTPAGPipeline"
HOST, FLUX = "StableDiffusionPipeline", "FluxPipeline"


def _built(name, patched, backend):
    """The pipeline, its arguments, and PAG by separate forwards where it has none."""
    torch.manual_seed(0)
    host = tiny_hosts.HOSTS.get(name)
    pipe = (tiny_hosts if host else tiny).build(name)
    kwargs = (tiny_hosts if host else tiny).call_kwargs(name, pipe, steps=2)
    layers, how = host.layers["middle"] if host else None, contextlib.nullcontext()
    if patched:
        pag_fast.patch(pipe, layers, backend=backend)
    elif host:
        model = getattr(pipe, "unet", None) or pipe.transformer
        chosen = list(resolve(model, layers).values())
        how = slow_pag(pipe, name, chosen, 3.0, host.cfg_scale(kwargs))
    return pipe, kwargs, how


def _run(pipe, kwargs):
    return type(pipe).__call__.__wrapped__(pipe, **kwargs)[0]


def _tangent(name, patched, backend="torch", of_weight=None):
    pipe, kwargs, how = _built(name, patched, backend)
    torch.manual_seed(5)
    with sdpa_kernel(SDPBackend.MATH), how, torch.no_grad(), forward_ad.dual_level():
        if of_weight is None:
            prompt = kwargs["prompt_embeds"]
            kwargs["prompt_embeds"] = forward_ad.make_dual(prompt, torch.randn_like(prompt))
        else:
            model = getattr(pipe, "unet", None) or pipe.transformer
            weight = model.get_parameter(of_weight)
            # the parameter itself, so that it looks like any other
            weight.copy_(forward_ad.make_dual(weight.clone(), torch.randn_like(weight)))
        picture, tangent = forward_ad.unpack_dual(_run(pipe, kwargs))
        return picture.clone(), tangent.clone()


def _check(*arguments, backend="torch", **options):
    picture, tangent = _tangent(*arguments, False, **options)
    ours, found = _tangent(*arguments, True, backend, **options)
    assert tangent.norm() > 0
    assert relative(found, tangent) < 1e-4
    assert relative(ours, picture) < 1e-5


@pytest.mark.parametrize("name", [SD, SD3, SANA, HUNYUAN, HOST, FLUX])
def test_of_prompts(name):
    _check(name)


@pytest.mark.skipif(not pag_fast.ops.backend._installed(), reason="without kernels")
@pytest.mark.parametrize("name", [SD3, SANA, HUNYUAN])
def test_kernels_have_no_tangent(name):
    _check(name, backend="triton")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (SD, "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"),
        (SD3, "transformer_blocks.2.attn.to_v.weight"),
        (FLUX, "transformer_blocks.0.attn.to_q.weight"),
    ],
)
def test_of_a_weight(name, layer):
    """What is packed of several weights has no tangent of one."""
    _check(name, of_weight=layer)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().mean())(x),
    "vmap": lambda f, x: torch.vmap(f, randomness="same")(torch.stack([x, 0.5 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [SD, FLUX])
def test_transforms_are_refused(name, transform):
    pipe, kwargs, _ = _built(name, True, "torch")
    prompt = kwargs["prompt_embeds"]

    def run(x):
        return _run(pipe, kwargs | {"prompt_embeds": x})

    with torch.enable_grad(), pytest.raises(ValueError, match=r"Inside of torch\.func's"):
        TRANSFORMS[transform](run, prompt)
    # the pipeline is as it was
    fresh, kwargs, _ = _built(name, True, "torch")
    generator = kwargs["generator"].clone_state()
    with torch.no_grad():
        after = _run(pipe, kwargs | {"generator": generator})
        assert relative(after, _run(fresh, kwargs)) < 1e-6
