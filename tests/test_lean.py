"""Launches that change nothing are left out, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents
from torch import nn

import pag_fast
from pag_fast.fusion import Lean
from pag_fast.fusion.packed_linears import Joined
from pag_fast.fusion.projections import QKV, TimeProjections
from pag_fast.fusion.unit import UNIT

UNET = "StableDiffusionPAGPipeline"


def _storages(module):
    return {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()
    }


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


# ---- joined weights ----


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_keep_parameters_and_values(bias):
    linears = _linears(4, 4, 2, bias=bias)
    parameters = [p for linear in linears for p in linear.parameters()]
    values = [p.clone() for p in parameters]
    joined = Joined(linears)
    assert joined.intact()
    assert joined.weight.shape == (10, 6)
    after = [p for linear in linears for p in linear.parameters()]
    assert all(a is b for a, b in zip(after, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))
    linears[1].weight.mul_(2)  # a merged LoRA writes in place
    assert joined.intact() and torch.equal(joined.weight[4:8], 2 * values[2 if bias else 1])
    # a second pipeline with this model finds them joined
    assert Joined(linears).weight.data_ptr() == joined.weight.data_ptr()
    joined.part()
    assert not joined.intact()
    assert len({p.untyped_storage().data_ptr() for p in after}) == len(after)


def test_replaced_weights_are_noticed():
    linears = _linears(4, 4)
    joined = Joined(linears)
    linears[1].weight.data = linears[1].weight.data.clone()
    assert not joined.intact()


def test_only_plain_layers_of_one_kind_are_joined():
    assert Joined.fits(_linears(4, 2))
    one = _linears(4)[0]
    hooked = _linears(4)[0]
    hooked.forward = hooked.forward
    tied = _linears(4)[0]
    tied.weight = one.weight
    others = [
        nn.Linear(5, 4, dtype=torch.float64),
        nn.Linear(6, 4, bias=False, dtype=torch.float64),
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 1, dtype=torch.float64),
        hooked,
        tied,
        None,
    ]
    for other in others:
        assert not Joined.fits([one, other]), other
    assert not Joined.fits([one])


def test_qkv_computes_once_for_the_same_tensor_only():
    linears = _linears(4, 4, 4)
    x, y = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    expected = {name: [linear(t) for linear in linears] for name, t in (("x", x), ("y", y))}
    group = QKV(Joined(linears))
    for given, value in ((x, "x"), (y, "y"), (x, "x")):
        outs = [group(index, given) for index in range(3)]
        assert all(torch.allclose(a, b) for a, b in zip(outs, expected[value], strict=True))
        assert len({out.untyped_storage().data_ptr() for out in outs}) == 1
        assert group._x is None and not group._parts
    group(0, x)
    assert torch.allclose(group(1, y), expected["y"][1])
    group.broken = True
    assert torch.equal(group(0, x), linears[0](x))


def test_time_projections_follow_the_branches():
    linears, state = _linears(4, 3), pag_fast.sharing.rows.BranchState()
    state.slabs = (1, 2, 3)
    temb = torch.randn(6, 6, dtype=torch.float64)
    temb[4:] = temb[2:4]
    expected = [linear(torch.nn.functional.silu(temb)) for linear in linears]
    group = TimeProjections([(nn.SiLU(), linear) for linear in linears], Joined(linears))
    group.state = state
    for step in range(2):
        state.step = step
        for rows in (4, 6, 2, 4):
            for index in range(2):
                assert torch.allclose(group(index, temb[:rows]), expected[index][:rows])
    other = torch.randn(6, 6, dtype=torch.float64)
    assert torch.allclose(group(0, other), linears[0](torch.nn.functional.silu(other)))
    state.step += 1
    temb.mul_(2)
    assert torch.allclose(group(0, temb), linears[0](torch.nn.functional.silu(temb)))


# ---- pipelines ----


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_are_joined_and_found_as_they_were(name):
    pipe = build(name)
    model = getattr(pipe, PIPELINES[name].denoiser)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    storages = _storages(model)
    stock = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    joined = _storages(model)
    assert len(joined) < len(storages)
    assert sum(joined.values()) <= sum(storages.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pag_fast.unpatch(pipe)
    assert len(_storages(model)) == len(storages)
    assert [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


def test_off():
    pipe = pag_fast.patch(build(UNET), fewer_launches=False)
    storages = _storages(pipe.unet)
    latents(pipe, call_kwargs(UNET, pipe))
    assert _storages(pipe.unet) == storages


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
    joined = _storages(first.unet)
    latents(second, call_kwargs(UNET, second))
    latents(first, call_kwargs(UNET, first))
    assert _storages(first.unet) == joined


def test_a_patched_pipeline_can_be_saved(tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = pag_fast.patch(build(UNET))
    latents(pipe, call_kwargs(UNET, pipe))
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_that_hooks_move_are_left_alone():
    unet = build(UNET).unet
    assert Lean(unet).qkv and Lean(unet).time
    unet.mid_block._hf_hook = object()
    lean = Lean(unet)
    assert not lean.qkv and not lean.time and lean.divisors


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
