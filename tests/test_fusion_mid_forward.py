"""What somebody changes in the middle of a forward about projections of the time embedding."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from numerics import relative
from torch import nn

import pag_fast
from pag_fast.runtime.compatibility import row_wise

SD, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
# where the hook is, and the module whose activation and linear layer come later in the forward
PLACES = {
    SD: ("time_embedding", "up_blocks.1.resnets.0", "nonlinearity", "time_emb_proj"),
    SD3: ("time_text_embed", "transformer_blocks.4.norm1", "silu", "linear"),
}


@row_wise
def _louder(module, args, out):
    return 1.5 * out


@row_wise
def _quieter(module, args):
    return (0.5 * args[0],)


def _wrap(module):
    before = module.forward

    @row_wise
    def forward(*args, **kwargs):
        return 1.5 * before(*args, **kwargs)

    module.forward = forward


def _replace(owner, name):
    other = copy.deepcopy(getattr(owner, name))
    vars(other).pop("forward", None)
    with torch.no_grad():
        other.weight.mul_(3)
    setattr(owner, name, other)


CHANGES = {
    "a hook on the activation": lambda owner, act, linear: getattr(
        owner, act
    ).register_forward_hook(_louder),
    "a hook in front of the activation": lambda owner, act, linear: getattr(
        owner, act
    ).register_forward_pre_hook(_quieter),
    "a hook on the layer": lambda owner, act, linear: getattr(owner, linear).register_forward_hook(
        _louder
    ),
    "a hook in front of the layer": lambda owner, act, linear: getattr(
        owner, linear
    ).register_forward_pre_hook(_quieter),
    "a forward around the activation": lambda owner, act, linear: _wrap(getattr(owner, act)),
    "a forward around the layer": lambda owner, act, linear: _wrap(getattr(owner, linear)),
    "another activation": lambda owner, act, linear: setattr(owner, act, nn.Tanh()),
    "another layer": lambda owner, act, linear: _replace(owner, linear),
    "another layer behind it": lambda owner, act, linear: setattr(
        owner, linear, nn.Sequential(getattr(owner, linear), nn.Tanh())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PLACES)
def test_a_layer_behind_gets_what_is_activated(name, change):
    """An embedding is left to the layer only if nobody else sees it on the way there."""
    first, place, act, linear = PLACES[name]
    found = []
    for patched in (False, True):
        pipe = tiny.build(name)
        model = getattr(pipe, "unet", None) or pipe.transformer
        kwargs = tiny.call_kwargs(name, pipe, steps=3)
        plain = tiny.latents(pipe, kwargs)
        seen = []

        @row_wise
        def once(module, args, out, model=model, seen=seen):
            seen.append(module)
            if len(seen) == 2:
                CHANGES[change](model.get_submodule(place), act, linear)

        model.get_submodule(first).register_forward_hook(once)
        if patched:
            pag_fast.patch(pipe, strict=True)
        found.append(tiny.latents(pipe, kwargs))
        assert relative(found[-1], plain) > 5e-5
    assert relative(*found) < 1e-5


@row_wise
def _write(module, args, out):
    args[1].mul_(1.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("place", ["mid_block.resnets.0", "up_blocks.1.resnets.0"])
def test_a_hook_writes_into_the_embedding(place, mode):
    """Inference tensors do not tell: with hooks on the model each layer computes for itself."""
    pipe = tiny.build(SD)

    def run():
        with mode():
            return tiny.latents(pipe, tiny.call_kwargs(SD, pipe, steps=3))

    plain = run()
    pipe.unet.get_submodule(place).register_forward_hook(_write)
    stock = run()
    assert relative(stock, plain) > 1e-3
    with pag_fast.patched(pipe, strict=True):
        assert relative(run(), stock) < 1e-5
