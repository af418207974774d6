"""Pipelines of every family with fewer launches draw the same, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import tiny_hosts
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from joined import owns_storages
from launches import CountOps, fusion_of
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.fusion.packed_linears import _WHOLES
from pag_fast.fusion.projections import QKV, TimeProjections
from pag_fast.runtime.access.instance_patch import InstancePatch, as_put_on
from pag_fast.sharing.threads import HERE

UNET = "StableDiffusionPAGPipeline"


def _wholes(module):
    """What of a model lies together."""
    parameters = list(module.parameters())
    return {w for w in list(_WHOLES.values()) if any(map(w.contains, parameters))}


# ---- pipelines ----


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_are_joined_and_found_as_they_were(name):
    pipe = build(name)
    model = getattr(pipe, PIPELINES[name].denoiser)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    assert _wholes(model) and owns_storages(list(model.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pag_fast.unpatch(pipe)
    assert not _wholes(model) and owns_storages(list(model.parameters()))
    assert [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


def test_off():
    pipe = pag_fast.patch(build(UNET), fewer_launches=False)
    latents(pipe, call_kwargs(UNET, pipe))
    assert not _wholes(pipe.unet)


@pytest.mark.parametrize("change", ["dtype", "lora", "processor", "values"])
def test_models_changed_between_calls(change):
    def run(pipe):
        first = latents(pipe, call_kwargs(UNET, pipe))
        if change == "dtype":
            pipe.to(torch.float64).to(torch.float32)
        elif change == "processor":
            pipe.unet.set_attn_processor(_Transposed())
        elif change == "values":
            with torch.no_grad():
                for p in pipe.unet.parameters():
                    p.data = p.data * 1.5
        else:
            peft = pytest.importorskip("peft")
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
            pipe.unet.add_adapter(config)
            with torch.no_grad():
                for name, p in pipe.unet.named_parameters():
                    if "lora_B" in name:
                        p.normal_()
        return first, latents(pipe, call_kwargs(UNET, pipe))

    stock = run(build(UNET))
    patched = run(pag_fast.patch(build(UNET)))
    assert relative(stock[1], stock[0]) > 1e-6 or change == "dtype"
    for ours, theirs in zip(patched, stock, strict=True):
        assert relative(ours, theirs) < 1e-5


class _Transposed(AttnProcessor2_0):
    """A processor that we do not know: attends to the tokens in reverse order, scaled."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 1.1 * super().__call__(attn, hidden_states.flip(1), *args, **kwargs)


def test_weights_replaced_by_a_callback():
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            for name, p in pipe.unet.named_parameters():
                if "attn1.to_k" in name or "time_emb_proj" in name:
                    p.data = p.data * 3.0
        return tensors

    def run(pipe):
        return latents(pipe, call_kwargs(UNET, pipe, steps=4, callback_on_step_end=callback))

    plain = latents(build(UNET), call_kwargs(UNET, build(UNET), steps=4))
    stock = run(build(UNET))
    assert relative(stock, plain) > 1e-4
    assert relative(run(pag_fast.patch(build(UNET))), stock) < 1e-5


def test_pipelines_that_share_a_model_do_not_move_its_weights_in_turns():
    first = pag_fast.patch(build(UNET))
    second = pag_fast.patch(copy.copy(build(UNET)))
    second.unet = first.unet
    latents(first, call_kwargs(UNET, first))
    joined, places = _wholes(first.unet), [p.data_ptr() for p in first.unet.parameters()]
    latents(second, call_kwargs(UNET, second))
    latents(first, call_kwargs(UNET, first))
    assert _wholes(first.unet) == joined and joined
    assert [p.data_ptr() for p in first.unet.parameters()] == places


def test_weights_that_hooks_move_are_left_alone():
    unet = build(UNET).unet
    fusion = fusion_of(unet)
    with torch.no_grad():
        assert fusion.refresh() and len(fusion.summary()) == 4 and _wholes(unet)
        unet.mid_block._hf_hook = object()
        assert fusion.refresh() and len(fusion.summary()) == 2 and not _wholes(unet)
        assert fusion.entries and not fusion.refresh()
        assert not any(key == "forward" for _, key, _ in fusion.entries)
        del unet.mid_block._hf_hook
        assert fusion.refresh() and len(fusion.summary()) == 4


def test_explained():
    pipe = build(UNET)
    modules = list(pipe.unet.modules())
    selves = sum(getattr(m, "is_cross_attention", None) is False for m in modules)
    resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in modules)
    attentions = sum(hasattr(m, "rescale_output_factor") for m in modules)
    ones, asked = attentions + resnets, attentions - 1  # one is perturbed
    assert pag_fast.explain(pipe, flops=False).launches == (
        f"UNet2DConditionModel: queries, keys and values as one product: {selves} times",
        f"UNet2DConditionModel: projections of the time embedding as one: {resnets}",
        f"UNet2DConditionModel: divisions by one left out: {ones}",
        f"UNet2DConditionModel: signatures of processors not built anew: {asked}",
    )
    pag_fast.patch(pipe, fewer_launches=False)
    assert pag_fast.explain(pipe, flops=False).launches == ()
    assert "fewer launches" not in str(pag_fast.explain(pipe, flops=False))


# ---- families ----

# how many products of several projections a forward of each model has
FAMILIES = {
    "FluxPipeline": 3 * 2 + 3,
    "QwenImagePipeline": 4 * 2,
    "WanPipeline": 4,
    "LTXPipeline": 4,
    "CogVideoXPipeline": 4,
    "HunyuanVideoPipeline": 1 + 3 * 2 + 3,
    "Lumina2Pipeline": 4 + 2,
    "StableDiffusion3Pipeline": 6 * 2,
    "StableDiffusionXLPipeline": None,
}


def _calls(pipe, name, steps=1):
    """The arguments of every forward of the denoiser in a call."""
    model, found = pipe.unet if hasattr(pipe, "unet") else pipe.transformer, []
    own = model.forward
    model.forward = lambda *args, **kwargs: found.append((args, kwargs)) or own(*args, **kwargs)
    try:
        tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, steps=steps))
    finally:
        del model.forward
    return model, found


def _alone_and_together(model, calls, fusion):
    state = fusion.state

    def run():
        outs = []
        for args, kwargs in calls:
            state.step += 1
            outs.append(model(*copy.deepcopy(args), **copy.deepcopy(kwargs))[0].flatten())
        return torch.cat(outs)

    with torch.no_grad():
        alone = run()
        fusion.refresh()
        state.thread = HERE.me
        with as_put_on(InstancePatch(fusion.entries)), CountOps() as counted:
            together = run()
        state.thread = None
        with CountOps() as stock:
            assert torch.equal(run(), alone)
    products = [ops["aten::mm"] + ops["aten::addmm"] for ops in (stock.ops, counted.ops)]
    return alone, together, (products[0] - products[1]) // len(calls)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in tiny_hosts.HOSTS])
def test_every_family(name):
    pipe = tiny_hosts.build(name)
    model, calls = _calls(pipe, name)
    fusion = fusion_of(model)
    expected = [g for g in fusion.groups if isinstance(g, QKV)]
    promised = fusion.summary()
    alone, together, fewer = _alone_and_together(model, calls, fusion)
    assert relative(together, alone) < 1e-6
    assert fusion.summary() == promised  # what would run is what runs
    assert not any(group.wasted for group in fusion.groups)
    if FAMILIES[name] is not None:
        assert len(expected) == FAMILIES[name]
    assert f"one product: {len(expected)} times" in promised[0]
    time = [g for g in fusion.groups if isinstance(g, TimeProjections)]
    assert fewer == 2 * len(expected) + sum(len(g.packed.linears) - 1 for g in time)


def test_second_attention_of_sd35():
    pipe = build("StableDiffusion3PAGPipeline", sd35=True)
    assert sum(isinstance(g, QKV) for g in fusion_of(pipe.transformer).groups) == 6 * 2 + 4


def _joined_attentions(fusion):
    return [g for g in fusion.groups if isinstance(g, QKV) and g.packed.joined]


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline", "HunyuanVideoPipeline"])
def test_models_that_diffusers_has_fused_are_left_alone(name):
    pipe = tiny_hosts.build(name)
    model, calls = _calls(pipe, name)
    fusion = fusion_of(model)
    alone, _, fewer = _alone_and_together(model, calls, fusion)
    assert fewer > 0
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{name} has no fuse_qkv_projections")
    model.fuse_qkv_projections()
    if not any(getattr(m, "fused_projections", False) for m in model.modules()):
        pytest.skip(f"fuse_qkv_projections of {name} does nothing")
    for again in (fusion, fusion_of(model)):
        fused, together, fewer = _alone_and_together(model, calls, again)
        assert relative(fused, alone) < 1e-6 and relative(together, fused) < 1e-6
        assert "queries" not in " ".join(again.summary()) and not _joined_attentions(again)
        time = [g for g in again.groups if isinstance(g, TimeProjections)]
        assert fewer == sum(len(g.packed.linears) - 1 for g in time)


def test_a_processor_of_an_equal_name_is_not_known():
    unet = build(UNET).unet
    unet.set_attn_processor(type("AttnProcessor2_0", (AttnProcessor2_0,), {})())
    assert "queries" not in " ".join(fusion_of(unet).summary())


def test_layers_of_several_owners_run_apart():
    unet = build(UNET).unet
    resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    before = fusion_of(unet).summary()[1]
    resnets[1].nonlinearity = resnets[0].nonlinearity
    assert fusion_of(unet).summary()[1] != before


def test_a_model_on_the_meta_device_is_refreshed_again_and_again():
    """There is no autocast on that device, and asking for it is an error."""
    model = build(UNET).unet.to("meta")
    fusion, x = fusion_of(model), torch.randn(1, 4, 8, 8, device="meta")
    text = torch.randn(1, 5, model.config.cross_attention_dim, device="meta")
    with torch.no_grad():
        for _ in range(3):
            fusion.refresh()
            assert fusion.entries
            with as_put_on(InstancePatch(fusion.entries)):
                assert model(x, 1, text).sample.shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert fusion.refresh(), "within autocast projections run apart"
