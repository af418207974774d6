"""How many heads a layer has is what its class says, or what its product shows, and no guess."""

from __future__ import annotations

import pytest
import torch
from built_hosts import denoiser_of
from numerics import relative
from own_models import HEADS, build, prompts
from tiny_hosts import HOSTS, call_kwargs, latents
from tiny_hosts import build as build_host

import pag_fast
from pag_fast.models.layer_names import self_attentions
from pag_fast.perturbations import Layer, Rows, SoftIdentity
from pag_fast.runtime.perturbed_branches import layers_of

FAMILIES = {HOSTS[name].family: name for name in reversed(HOSTS)}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_described_layer_says_its_heads(name):
    model = denoiser_of(build_host(name))
    attentions, layers = self_attentions(model), layers_of(model)
    assert attentions.keys() == layers.keys()
    assert all(layer.heads > 0 for layer in layers.values())


@pytest.mark.skipif("Krea2Pipeline" not in HOSTS, reason="this diffusers has no Krea 2")
def test_strengths_where_heads_have_another_name():
    """Those of queries: keys and values have fewer."""
    name = "Krea2Pipeline"
    pipe, layers, made = build_host(name), HOSTS[name].layers["middle"], {}
    plain = latents(pipe, call_kwargs(name, pipe))
    for how in (0.0, 0.5, 1.0, (0.5,) * 4, (0.0, 1.0, 1.0, 0.0)):
        with pag_fast.patched(pipe, layers, perturbation=SoftIdentity(how)):
            made[how] = latents(pipe, call_kwargs(name, pipe))
    assert relative(made[0.0], plain) < 1e-5
    assert relative(made[(0.5,) * 4], made[0.5]) < 1e-5
    apart = [made[how] for how in (0.0, 0.5, 1.0, (0.0, 1.0, 1.0, 0.0))]
    assert all(relative(x, y) > 1e-3 for i, x in enumerate(apart) for y in apart[:i])
    with pytest.raises(ValueError, match=r"holds 3 numbers, and transformer_blocks.* has 4 heads"):
        pag_fast.patch(pipe, layers, perturbation=SoftIdentity([0.5] * 3))


def test_strengths_of_a_class_that_does_not_say():
    """A trace does, when the call begins."""
    made = []
    for strength in (0.4, [0.4] * HEADS, [0.0] * HEADS, 0.0):
        pipe = build()
        pag_fast.patch(pipe, [r"layers\.1\."], perturbation=SoftIdentity(strength))
        made.append(pipe(**prompts()))
    assert relative(made[0], made[1]) < 1e-5 and relative(made[2], made[3]) < 1e-5
    assert relative(made[0], made[2]) > 1e-3
    pipe = build()
    pag_fast.patch(pipe, [r"layers\.1\."], perturbation=SoftIdentity([0.4] * (HEADS + 1)))
    with pytest.raises(ValueError, match=rf"layers\.1\.mixer has {HEADS} heads"):
        pipe(**prompts())


@pytest.mark.parametrize("said", [[1, 2], "4", 2.0, None], ids=str)
def test_what_a_class_of_ones_own_calls_heads(said):
    pipe = build()
    for block in pipe.transformer.layers:
        block.mixer.heads = said
    pag_fast.patch(pipe, [r"layers\.1\."], perturbation=SoftIdentity(0.4))
    out = pipe(**prompts())
    other = build()
    pag_fast.patch(other, [r"layers\.1\."], perturbation=SoftIdentity(0.4))
    assert torch.equal(out, other(**prompts()))


@pytest.mark.parametrize("linear", [False, True])
def test_one_strength_is_that_of_all_heads(linear):
    """Where nobody knows how many there are."""
    how, made = SoftIdentity(0.3), []
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind()
    for heads in (0, 4):
        layer = Layer(heads=heads, linear=linear)
        constant = torch.tensor(how.constant(layer))
        rows = Rows(q.clone(), k.clone(), v.clone(), num_attend=1, layer=layer, constant=constant)
        made.append(how.attend(rows))
    assert torch.equal(*made)
    assert SoftIdentity([0.1, 0.2]).constant(Layer()) == (0.1, 0.2)
