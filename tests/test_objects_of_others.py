"""Objects of others on a model: tensors for numbers, what compares by ``==``, in two places."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import relative
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pag_fast
from pag_fast.runtime.compatibility import row_wise

SD, XL, SD3 = (f"StableDiffusion{x}PAGPipeline" for x in ("", "XL", "3"))
PIXART, SANA, DIT = "PixArtSigmaPAGPipeline", "SanaPAGPipeline", "HunyuanDiTPAGPipeline"


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _call(name, pipe, inside=contextlib.nullcontext):
    with inside():
        return tiny.latents(pipe, tiny.call_kwargs(name, pipe))


def _compare(name, prepare, change=lambda model: None, inside=contextlib.nullcontext):
    """Stock's picture and ours behind a change; returns what was said of ours."""
    pictures, said = [], ""
    for patched in (False, True):
        pipe = tiny.build(name)
        prepare(_model(pipe))
        if patched:
            pag_fast.patch(pipe)
        torch.manual_seed(0)
        first = _call(name, pipe)
        change(_model(pipe))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            pictures.append(_call(name, pipe, inside))
        said = " ".join(str(w.message) for w in told if "pag_fast" in str(w.message))
        if not patched and change.__name__ != "<lambda>":
            assert relative(pictures[0], first) > 1e-4, "nothing has changed"
    assert relative(pictures[1], pictures[0]) < 1e-5
    return said


# ---- one module in several places ----


def _blocks(model):
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def _again(at, other):
    def change(model):
        blocks = _blocks(model)
        blocks[other] = blocks[at]

    return change


def _attention_again(at, other):
    def change(model):
        blocks = _blocks(model)
        blocks[other].attn2 = blocks[at].attn2

    return change


def _of_a_unet(model):
    down, up = model.down_blocks[1].attentions[0], model.up_blocks[1].attentions[0]
    down.transformer_blocks[0].attn1 = up.transformer_blocks[0].attn1


def _one_key(model):
    blocks = _blocks(model)
    blocks[0].attn2.to_k = blocks[-1].attn2.to_k


@pytest.mark.parametrize(
    ("name", "share"),
    [
        (PIXART, _again(1, 2)),
        (PIXART, _attention_again(-1, -2)),
        (PIXART, _one_key),
        (DIT, _attention_again(-1, 0)),
        (SD3, _again(1, 2)),
        (SANA, _again(-1, -2)),
        (SD, _of_a_unet),
    ],
)
def test_a_module_that_stands_in_two_places(name, share):
    """Before the first call, and between two."""
    place = "stands in several places"
    pipe = tiny.build(name)
    share(_model(pipe))
    stock = _call(name, pipe)
    with pytest.warns(UserWarning, match=place):
        pag_fast.patch(pipe)
        assert relative(_call(name, pipe), stock) < 1e-5

    def shared(model):
        share(model)

    assert place in _compare(name, lambda model: None, shared)


# ---- modes ----


class _Eighths(TorchFunctionMode):
    """Inputs of feed-forwards in 8 bits, with one scale for the batch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and args[1].shape[0] != args[1].shape[1]:
            scale = args[0].abs().amax() / 127
            args = ((args[0] / scale).round() * scale, *args[1:])
        return function(*args, **(kwargs or {}))


class _Cooler(TorchDispatchMode):
    """Results of feed-forwards, less by what is the largest in the batch."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.addmm.default and args[1].shape[1] != out.shape[1]:
            out = out - 0.01 * out.amax()
        return out


@row_wise
class _Counts(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [SD, XL, SD3, PIXART])
@pytest.mark.parametrize("mode", [_Eighths, _Cooler])
def test_modes_make_branches_run_apart(name, mode):
    plain = _call(name, tiny.build(name))
    said = _compare(name, lambda model: None, inside=mode)
    assert f"a mode of test_objects_of_others ({mode.__name__})" in said
    assert relative(_call(name, tiny.build(name), mode), plain) > 1e-4


def test_modes_that_treat_every_row_by_itself():
    for mode in (_Counts, lambda: torch.device("cpu"), torch.no_grad):
        assert _compare(SD, lambda model: None, inside=mode) == ""


# ---- tensors where numbers are, and what compares by == ----


class Stores(AttnProcessor2_0):
    gain = torch.ones(3)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * type(self).gain.mean()


@dataclasses.dataclass
class Holds:
    gain: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return out * self.gain.mean()


row_wise(Stores)
row_wise(Holds)


def _with(make):
    def change(model):
        processors = model.attn_processors
        model.set_attn_processor({n: make() if "attn2" in n else p for n, p in processors.items()})

    return change


def _store(value):
    def change(model):
        Stores.gain = torch.full((3,), value)

    return change


def test_a_tensor_in_the_class_of_a_processor():
    def prepare(model):
        _store(1.0)(model)
        _with(Stores)(model)

    _compare(SD, prepare, _store(1.2))


def test_processors_that_compare_by_their_tensors():
    _compare(SD, _with(lambda: Holds(torch.ones(3))), _with(lambda: Holds(torch.full((3,), 1.2))))


def _resnet(model):
    return model.up_blocks[1].resnets[0]


def test_a_divisor_that_is_a_tensor():
    def one(model):
        _resnet(model).output_scale_factor = torch.tensor(1.0)

    def written(model):
        _resnet(model).output_scale_factor.mul_(1.3)

    def put(model):
        _resnet(model).output_scale_factor = torch.tensor(1.3)

    def many(model):
        attention = model.up_blocks[1].attentions[0].transformer_blocks[0].attn1
        attention.rescale_output_factor = torch.linspace(1.0, 1.5, attention.to_q.in_features)

    _compare(SD, one, written)
    _compare(SD, lambda model: None, put)
    _compare(SD, many)
    _compare(SD, lambda model: None, many)


def _draws_by_element():
    """Whether masks of rows in two calls are those of all rows in one: not by MKL, nor on GPUs."""
    found = []
    for sizes in ((3,), (2, 1)):
        torch.manual_seed(0)
        found += [torch.cat([nn.functional.dropout(torch.ones(n, 64)) for n in sizes])]
    return torch.equal(*found)


@pytest.mark.skipif(not _draws_by_element(), reason="stock draws masks of its rows in two calls")
def test_a_dropout_that_is_turned_on_later():
    def change(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        model.train()

    assert "every row has a dropout of its own" in _compare(SD, lambda model: None, change)
