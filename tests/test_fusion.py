"""Launches that change nothing are left out, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import tiny_hosts
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from launches import CountOps, fusion_of
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents
from torch import nn
from torch.nn.utils import parametrize, prune

import pag_fast
from pag_fast.fusion.packed_linears import _WHOLES, PackedLinears
from pag_fast.fusion.projections import QKV, TimeProjections
from pag_fast.fusion.unit import UNIT
from pag_fast.runtime.instance_patch import InstancePatch, as_put_on
from pag_fast.sharing.replacement import MISSING
from pag_fast.sharing.rows import BranchState
from pag_fast.sharing.threads import HERE

UNET = "StableDiffusionPAGPipeline"


def _wholes(module):
    """What of a model lies together."""
    parameters = list(module.parameters())
    return {w for w in list(_WHOLES.values()) if any(map(w.contains, parameters))}


def _owns_storages(parameters):
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    sizes = [p.numel() * p.element_size() for p in parameters]
    return list(storages.values()) == sizes


class _Subclass(torch.Tensor):
    pass


def _packed(linears):
    packed = PackedLinears(linears)
    assert packed.fits()
    packed.join()
    return packed


def _linears(*outputs, bias=True):
    layers = [nn.Linear(6, rows, bias=bias, dtype=torch.float64) for rows in outputs]
    return [layer.requires_grad_(False) for layer in layers]


# ---- a factor of one ----


def test_unit_divides_without_a_kernel_and_is_one_otherwise():
    x = torch.randn(3)
    assert x / UNIT is x
    assert UNIT == 1.0 and f"{UNIT}" == "1.0"
    assert torch.equal(torch.arange(3) / UNIT, torch.arange(3) / 1.0)
    assert torch.equal(x * UNIT, x) and torch.equal(torch.div(x, 1.0), x)
    assert torch.equal(UNIT / x, 1.0 / x)
    assert type(copy.deepcopy(UNIT)) is float and type(pickle.loads(pickle.dumps(UNIT))) is float


# ---- packed weights ----


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_keep_parameters_values_and_storages(bias):
    linears = _linears(4, 4, 2, bias=bias)
    parameters = [p for linear in linears for p in linear.parameters()]
    values = [p.clone() for p in parameters]
    packed = _packed(linears)
    assert packed.intact()
    assert packed.weight.shape == (10, 6)
    after = [p for linear in linears for p in linear.parameters()]
    assert all(a is b for a, b in zip(after, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))
    assert _owns_storages(after)
    linears[1].weight.mul_(2)  # a merged LoRA writes in place
    assert packed.intact() and torch.equal(packed.weight[4:8], 2 * values[2 if bias else 1])
    # a second pipeline with this model finds them joined
    assert _packed(linears).weight is packed.weight
    packed.split()
    assert not packed.intact() and packed.weight is None
    assert len({p.data_ptr() for p in after}) == len(after) and _owns_storages(after)
    assert torch.equal(linears[1].weight, 2 * values[2 if bias else 1])


def test_the_whole_is_freed_when_its_parts_are():
    linears = _linears(4, 4)
    packed = _packed(linears)
    whole = weakref.ref(packed._packed[0][0])
    kept = linears[0].weight.clone()
    parameter = linears[0].weight
    linears[0].weight = nn.Parameter(kept.clone(), requires_grad=False)
    del packed
    gc.collect()
    assert whole() is None
    junk = [torch.full_like(kept, 7.0) for _ in range(64)]
    assert torch.equal(parameter, kept) and junk  # a part keeps its memory alive


@pytest.mark.parametrize(
    "change", ["values", "object", "transposed", "dtype", "half", "moved", "rows", "bias", "none"]
)
def test_moved_weights_are_noticed(change):
    linears = _linears(6, 6, bias=False)
    packed = _packed(linears)
    one = linears[1]
    if change == "values":
        one.weight.data = one.weight.data.clone()
    elif change == "object":
        one.weight = nn.Parameter(one.weight.clone())
    elif change == "transposed":
        one.weight.data = one.weight.data.t()
    elif change == "dtype":
        one.weight.data = one.weight.data.view(torch.int64)
    elif change == "half":
        one.half()
    elif change == "moved":
        one.share_memory()
    elif change == "rows":
        one.weight.data = one.weight.data[:3]
    elif change == "bias":
        one.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    else:
        one.weight = None
    assert not packed.intact()


def test_only_plain_layers_of_one_kind_fit():
    assert PackedLinears(_linears(4, 2)).fits()
    one = _linears(4)[0]
    hooked, tied, seen, pruned = (_linears(4)[0] for _ in range(4))
    hooked.forward = hooked.forward
    tied.weight = one.weight
    seen.register_forward_hook(lambda *_: None)
    prune.random_unstructured(pruned, "weight", 0.5)
    shared, part, row, parametrized, twisted, subclass = (_linears(4)[0] for _ in range(6))
    shared.share_memory()
    part.weight.data = torch.zeros(8, 6, dtype=torch.float64)[:4]
    row.weight.data = row.weight.data[:, :5]
    parametrized.parametrizations = None
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    twisted.weight.data = torch.zeros(6, 4, dtype=torch.float64).t()
    subclass.weight = nn.Parameter(subclass.weight.data.as_subclass(_Subclass), requires_grad=False)
    with torch.inference_mode():
        inference = _linears(4)[0]
    offloaded = _linears(4)[0]
    offloaded._hf_hook = object()
    others = [
        nn.Linear(5, 4, dtype=torch.float64),
        nn.Linear(6, 4, bias=False, dtype=torch.float64),
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 1, dtype=torch.float64),
        *(hooked, tied, seen, pruned, shared, part, row, parametrized, twisted, subclass),
        *(inference, offloaded),
    ]
    for index, other in enumerate(others):
        assert not PackedLinears([one, other]).fits(), (index, other)
        assert not PackedLinears([other, one]).fits(), (index, other)
    assert not PackedLinears([one]).fits()


def test_slices_begin_on_16_bytes():
    def fits(*rows, dtype=torch.float32, inputs=4, bias=True):
        return PackedLinears([nn.Linear(inputs, n, bias, dtype=dtype) for n in rows]).fits()

    assert fits(4, 8, 4) and fits(4, 4, 3)  # the end of the last is nobody's beginning
    assert not fits(3, 4, 4) and fits(3, 4, 4, bias=False)
    assert not fits(4, 4, 4, dtype=torch.bfloat16) and fits(8, 8, 8, dtype=torch.bfloat16)
    assert not fits(1, 1, inputs=3, bias=False)


def _state():
    state = BranchState()
    state.thread = HERE.me
    return state


def _attention(*outputs):
    attention = nn.Module()
    for name, linear in zip(("to_q", "to_k", "to_v"), _linears(*outputs), strict=False):
        setattr(attention, name, linear)
    return attention


def test_qkv_computes_once_for_the_same_tensor_only():
    attention = _attention(4, 2, 2)
    linears = list(attention.children())
    x, y = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    expected = {name: [linear(t) for linear in linears] for name, t in (("x", x), ("y", y))}
    group = QKV(_state(), attention, ["to_q", "to_k", "to_v"])
    group.packed.join()
    for given, value in ((x, "x"), (y, "y"), (x, "x")):
        outs = [member(given) for member in group.members]
        assert all(torch.allclose(a, b) for a, b in zip(outs, expected[value], strict=True))
        assert len({out.untyped_storage().data_ptr() for out in outs}) == 1
        assert not group.pending
    # CogVideoX: two kinds of token in turns
    for member, ofx, ofy in zip(group.members, expected["x"], expected["y"], strict=True):
        assert torch.allclose(member(x), ofx) and torch.allclose(member(y), ofy)
    assert not group.pending and not group.wasted
    query, key, value = group.members
    query(x)
    assert torch.allclose(key(y), expected["y"][1]) and torch.allclose(value(y), expected["y"][2])
    assert group.wasted and not group.is_whole()  # attends to something else: runs apart from now
    group.forget()
    group.state.thread = None
    assert torch.equal(query(x), linears[0](x)) and not group.pending
    group.state.thread = HERE.me
    group.packed.split()
    assert torch.equal(query(x), linears[0](x)) and not group.pending


def test_gradients_flow_to_the_input():
    attention = _attention(4, 4, 4)
    group = QKV(_state(), attention, ["to_q", "to_k", "to_v"])
    group.packed.join()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    sum(member(x).square().sum() for member in group.members).backward()
    ours, x.grad = x.grad, None
    sum(linear(x).square().sum() for linear in attention.children()).backward()
    assert torch.equal(ours, x.grad) and ours.any()


def _projections(*rows):
    owners = [nn.Module() for _ in rows]
    for owner, linear in zip(owners, _linears(*rows), strict=True):
        owner.silu, owner.linear = nn.SiLU(), linear
    state = _state()
    group = TimeProjections(state, [(owner, "silu", "linear") for owner in owners])
    group.packed.join()
    for member in group.members:
        member.displace(vars(member.module).get("forward", MISSING))
        member.module.forward = member
    return group, owners, state


def test_time_projections_follow_the_branches():
    group, owners, state = _projections(4, 3)
    state.slabs = (1, 2, 3)
    temb = torch.randn(6, 6, dtype=torch.float64)
    temb[4:] = temb[2:4]
    silu = torch.nn.functional.silu

    def alone(owner, x):
        return torch.nn.functional.linear(silu(x), owner.linear.weight, owner.linear.bias)

    for step in range(2):
        state.step = step
        for rows in (4, 6, 2, 4):
            for owner in owners:
                out = owner.linear(owner.silu(temb[:rows]))
                assert torch.allclose(out, alone(owner, temb)[:rows])
    other = torch.randn(6, 6, dtype=torch.float64)
    one = owners[0]
    for x in (other, temb[::2], temb.float().double()):
        assert torch.allclose(one.linear(one.silu(x)), alone(one, x))
    temb.mul_(2)  # in the middle of a forward
    assert torch.allclose(one.linear(one.silu(temb)), alone(one, temb))
    state.step += 1
    assert torch.allclose(one.linear(one.silu(temb)), alone(one, temb))
    # a layer that is called without its activation, an activation without its layer
    assert torch.equal(
        one.linear(temb), torch.nn.functional.linear(temb, one.linear.weight, one.linear.bias)
    )
    image = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.equal(one.silu(image), silu(image))


def test_an_activation_runs_itself_where_its_layer_is_not_ours():
    group, owners, _ = _projections(4, 4)
    temb, one = torch.randn(2, 6, dtype=torch.float64), owners[0]
    expected = torch.nn.functional.linear(
        torch.nn.functional.silu(temb), one.linear.weight, one.linear.bias
    )
    ours = one.linear.forward
    for wrapped in (lambda x: ours(x), lambda x: nn.Linear.forward(one.linear, x)):
        one.linear.forward = wrapped
        assert torch.allclose(one.linear(one.silu(temb)), expected)
    one.linear.forward = ours
    # as nobody calls it, but could
    assert torch.allclose(one.linear(input=one.silu(temb)), expected)
    group.packed.split()
    assert torch.allclose(one.linear(one.silu(temb)), expected)


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
    assert _wholes(model) and _owns_storages(list(model.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pag_fast.unpatch(pipe)
    assert not _wholes(model) and _owns_storages(list(model.parameters()))
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
        assert fusion.refresh() and len(fusion.summary()) == 3 and _wholes(unet)
        unet.mid_block._hf_hook = object()
        assert fusion.refresh() and len(fusion.summary()) == 1 and not _wholes(unet)
        assert fusion.entries and not fusion.refresh()
        assert not any(key == "forward" for _, key, _ in fusion.entries)
        del unet.mid_block._hf_hook
        assert fusion.refresh() and len(fusion.summary()) == 3


def test_explained():
    pipe = build(UNET)
    modules = list(pipe.unet.modules())
    selves = sum(getattr(m, "is_cross_attention", None) is False for m in modules)
    resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in modules)
    ones = sum(hasattr(m, "rescale_output_factor") for m in modules) + resnets
    assert pag_fast.explain(pipe, flops=False).launches == (
        f"UNet2DConditionModel: queries, keys and values as one product: {selves} times",
        f"UNet2DConditionModel: projections of the time embedding as one: {resnets}",
        f"UNet2DConditionModel: divisions by one left out: {ones}",
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
