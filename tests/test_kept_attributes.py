"""Tensors of modules that are neither parameters nor buffers: what is kept goes by them, too."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from numerics import relative
from random_adapters import with_ip_adapter
from tiny_sag import build_sag, sag_kwargs
from torch import nn

import pag_fast
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sharing.weight_signature import WeightSignature

SD, XL, SD3 = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusion3PAGPipeline",
)
NETS = "StableDiffusionControlNetPAGPipeline"


@row_wise
class _Shifted(nn.Linear):
    """A layer that adds a tensor of its own, wherever that is kept."""

    def forward(self, x):
        return super().forward(x) + self.shift()

    def shift(self):
        kept = self.kept
        while not isinstance(kept, torch.Tensor):
            kept = kept["shift"] if isinstance(kept, dict) else kept[0]
        return kept


def _place(model):
    names = (
        "context_embedder",
        "add_embedding.linear_2",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    )
    return next(model.get_submodule(n) for n in names if _has(model, n))


def _has(model, name):
    try:
        return model.get_submodule(name) is not None
    except AttributeError:
        return False


KINDS = {
    "an attribute": lambda x: x,
    "in a list": lambda x: [x],
    "in a dictionary": lambda x: {"shift": x},
    "nested": lambda x: ({"shift": [x]},),
}
CHANGES = {
    "written in place": lambda layer: layer.shift().mul_(-3),
    "another memory": lambda layer: setattr(layer.shift(), "data", layer.shift() * -3),
}


def _in_a_callback(change):
    def callback(pipe, step, timestep, kwargs):
        if step == 1:
            with torch.no_grad():
                change(pipe)
        return {}

    return {"callback_on_step_end": callback}


def _run(name, pipe, **extra):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=5, **extra))


def _shifted(name, kind):
    pipe = tiny.build(name)
    layer = _place(pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet)
    layer.__class__ = _Shifted
    shift = torch.randn(layer.out_features, generator=torch.Generator().manual_seed(3))
    layer.kept = KINDS[kind](shift)
    return pipe, layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [SD, XL, SD3])
def test_a_tensor_changed_in_a_callback(name, change, kind):
    found = []
    for patched in (False, True):
        pipe, layer = _shifted(name, kind)
        if patched:
            pag_fast.patch(pipe, strict=True)
        else:
            plain = _run(name, pipe)
        found.append(_run(name, pipe, **_in_a_callback(lambda pipe: CHANGES[change](layer))))  # noqa: B023
    assert relative(found[0], plain) > 2e-5
    assert relative(found[1], found[0]) < 1e-5


def _replaced(layer):
    layer.kept[0] = layer.kept[0] * -3


def _under_another_key(layer):
    layer.kept["shift"] = layer.kept.pop("other")


@pytest.mark.parametrize("change", [_replaced, _under_another_key])
def test_another_tensor_in_a_collection(change):
    found = []
    for patched in (False, True):
        pipe, layer = _shifted(SD, "in a list")
        if change is _under_another_key:
            layer.kept = {"shift": layer.kept[0], "other": layer.kept[0] * -3}
        if patched:
            pag_fast.patch(pipe, strict=True)
        found.append(_run(SD, pipe, **_in_a_callback(lambda pipe: change(layer))))  # noqa: B023
    assert relative(found[0], _run(SD, _shifted(SD, "in a list")[0])) > 2e-5
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("name", [SD, XL])
def test_image_embeddings_on_a_projection(name):
    """FaceID-Plus has the image's own embeddings there, not among its arguments."""
    from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection as Projection

    def build():
        torch.manual_seed(3)
        pipe = with_ip_adapter(tiny.build(name))
        sizes = {"embed_dims": 12, "output_dims": 12, "hidden_dims": 8, "id_embeddings_dim": 6}
        made = Projection(**sizes, depth=1, dim_head=6, heads=2, num_tokens=4, num_queries=4)
        for parameter in made.requires_grad_(False).parameters():
            nn.init.normal_(parameter, std=0.3)
        made.clip_embeds = torch.randn(2, 1, 7, 8)[[0, 1, 1]]
        pipe.unet.encoder_hid_proj.image_projection_layers[0] = made.eval()
        return pipe

    def write(pipe):
        pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds.mul_(-2)

    extra = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    plain = _run(name, build(), **extra)
    stock = _run(name, build(), **extra, **_in_a_callback(write))
    pipe = pag_fast.patch(build(), strict=True)
    assert relative(stock, plain) > 2e-5
    assert relative(_run(name, pipe, **extra, **_in_a_callback(write)), stock) < 1e-5


def test_a_tensor_of_inference_mode_does_not_tell():
    """What is computed with it is not kept."""
    found = []
    for patched in (False, True):
        pipe, layer = _shifted(SD, "an attribute")
        with torch.inference_mode():
            layer.kept = layer.kept.clone()
            if patched:
                pag_fast.patch(pipe, strict=True)
            change = CHANGES["written in place"]
            found.append(_run(SD, pipe, **_in_a_callback(lambda pipe: change(layer))))  # noqa: B023
    assert relative(found[1], found[0]) < 1e-5


def test_self_attention_guidance():
    def run(pipe, patched):
        layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
        layer.__class__ = _Shifted
        layer.kept = torch.ones(layer.out_features)

        def write(step, timestep, x):
            if step == 1:
                layer.kept.mul_(-3)

        if patched:
            pag_fast.patch(pipe, strict=True)
        return pipe(**sag_kwargs(num_inference_steps=4, callback=write)).images

    stock = run(build_sag(), False)
    assert relative(run(build_sag(), True), stock) < 1e-5


def test_a_controlnet():
    found = []
    for patched in (False, True):
        pipe = tiny.build(NETS)
        layer = pipe.controlnet.controlnet_cond_embedding.conv_out
        own = type(layer)
        layer.__class__ = row_wise(
            type("Shifted", (own,), {"forward": lambda self, x: own.forward(self, x) + self.kept})  # noqa: B023
        )
        layer.kept = torch.ones(layer.out_channels, 1, 1)
        if patched:
            pag_fast.patch(pipe, strict=True)
        else:
            plain = _run(NETS, pipe)
        found.append(_run(NETS, pipe, **_in_a_callback(lambda pipe: layer.kept.mul_(-3))))  # noqa: B023
    assert relative(found[0], plain) > 2e-5
    assert relative(found[1], found[0]) < 1e-5


def test_what_has_no_address_and_what_holds_itself():
    layer = _Shifted(2, 2)
    layer.kept = [torch.eye(2).to_sparse()]
    layer.kept.append(layer.kept)
    weights = WeightSignature([layer])
    first = weights.look(1)
    assert weights.look(2) == first
    layer.kept[0].mul_(2)
    assert weights.look(3) == first + 1 == weights.look(4)
