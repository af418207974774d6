"""Launches that change nothing are left out: weights that lie together, and factors of one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from joined import owns_storages
from torch import nn
from torch.nn.utils import parametrize, prune

from pag_fast.fusion.packed_linears import PackedLinears
from pag_fast.fusion.projections import QKV, TimeProjections
from pag_fast.fusion.unit import UNIT
from pag_fast.sharing.replacement import MISSING
from pag_fast.sharing.rows import BranchState
from pag_fast.sharing.threads import HERE


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
    assert owns_storages(after)
    linears[1].weight.mul_(2)  # a merged LoRA writes in place
    assert packed.intact() and torch.equal(packed.weight[4:8], 2 * values[2 if bias else 1])
    # a second pipeline with this model finds them joined
    assert _packed(linears).weight is packed.weight
    packed.split()
    assert not packed.intact() and packed.weight is None
    assert len({p.data_ptr() for p in after}) == len(after) and owns_storages(after)
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
