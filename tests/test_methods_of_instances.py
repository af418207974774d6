"""Methods on instances: one comes where another, or any attribute, has been."""

from __future__ import annotations

import types
import warnings

import pytest
import tiny
import torch
from diffusers.models.attention import FeedForward
from numerics import relative
from torch import nn

import pag_fast
from pag_fast.runtime.compatibility import UNKNOWN, Compatibility, combined, row_wise

SD, XL, SD3 = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusion3PAGPipeline",
)
NETS = "StableDiffusionControlNetPAGPipeline"


def _call(name, pipe, **extra):
    return tiny.latents(pipe, tiny.call_kwargs(name, pipe, **extra))


def _mixing(name):
    """A method that adds the mean of all rows to what the class's own computes."""

    def method(self, *args, **kwargs):
        out = getattr(type(self), name)(self, *args, **kwargs)
        return out + 0.2 * out.mean(0, keepdim=True)

    return method


_MIXING = {name: _mixing(name) for name in ("_conv_forward", "forward")}


def _layers(model):
    """Some modules whose method can be replaced, and the name of that method."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)][3:8]
    found = [m for m in model.modules() if isinstance(m, FeedForward)][:2]
    return (convs, "_conv_forward") if convs else (found, "forward")


def _put_own(model):
    """What restores a method by assignment: the class's own, bound, in the instance."""
    modules, name = _layers(model)
    for module in modules:
        setattr(module, name, getattr(type(module), name).__get__(module))


def _put_mixing(model):
    modules, name = _layers(model)
    for module in modules:
        setattr(module, name, types.MethodType(_MIXING[name], module))


def _note(model):
    for module in _layers(model)[0]:
        module.note_of_mine = "x"


def _instead_of_a_note(model):
    for module in _layers(model)[0]:
        del module.note_of_mine
    _put_mixing(model)


PLACES = {
    "another method": (_put_own, _put_mixing),
    "a note": (_note, _instead_of_a_note),
}


def _model_of(pipe):
    return pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet


@pytest.mark.parametrize("when", ["between calls", "in a callback"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [SD, XL, SD3])
def test_a_method_comes_where_something_else_was(name, place, when):
    """Seamless tiling of some packages restores a layer's method by assignment, for example."""
    before, come = PLACES[place]

    def run(pipe):
        if when == "between calls":
            come(_model_of(pipe))
            return _call(name, pipe)

        def late(pipe, step, timestep, kwargs):
            if step == 0:
                come(_model_of(pipe))
            return {}

        return _call(name, pipe, steps=4, callback_on_step_end=late)

    pipe = tiny.build(name)
    before(_model_of(pipe))
    plain = _call(name, pipe, steps=3 if when == "between calls" else 4)
    stock = run(pipe)
    assert relative(stock, plain) > 1e-4
    pipe = tiny.build(name)
    before(_model_of(pipe))
    pag_fast.patch(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call(name, pipe)
    with pytest.warns(UserWarning, match=f"of {__name__}.*|replaced by {__name__}"):
        assert relative(run(pipe), stock) < 1e-5


@pytest.mark.filterwarnings("ignore:pag_fast")
def test_a_method_comes_onto_a_controlnet():
    pipe = tiny.build(NETS)
    _put_own(pipe.controlnet)
    plain = _call(NETS, pipe)
    pag_fast.patch(pipe)
    assert relative(_call(NETS, pipe), plain) < 1e-5
    _put_mixing(pipe.controlnet)
    patched = _call(NETS, pipe)
    pag_fast.unpatch(pipe)
    stock = _call(NETS, pipe)
    assert relative(stock, plain) > 1e-4
    assert relative(patched, stock) < 1e-5


def test_what_is_marked_gives_way_to_what_is_not():
    """And the other way around: what is row-wise again is shared again."""
    pipe = pag_fast.patch(tiny.build(SD))
    convs, name = _layers(pipe.unet)
    marked = row_wise(lambda x, *args: nn.Conv2d._conv_forward(convs[0], x, *args))
    convs[0]._conv_forward = marked
    _call(SD, pipe)
    assert set(pipe._pag_fast.steps) == {"shared"}
    convs[0]._conv_forward = types.MethodType(_MIXING[name], convs[0])
    with pytest.warns(UserWarning, match=f"a method of {__name__}"):
        _call(SD, pipe)
    shared = pipe._pag_fast.steps["shared"]
    convs[0]._conv_forward = marked
    _call(SD, pipe)
    assert pipe._pag_fast.steps["shared"] > shared


def test_a_watch_compares_callables_alone():
    """A note that is written anew is nobody's concern; a method counts, whatever its key."""
    model = tiny.build(SD).unet.requires_grad_(False)
    watch = Compatibility()
    _note(model)
    conv = _layers(model)[0][0]
    assert watch.look(model) == ()
    conv.note_of_mine = torch.ones(2)  # has no == of its own
    watch.begin()
    assert watch.look(model) == ()
    assert watch.looks == 1
    conv._conv_forward = conv._conv_forward
    assert watch.look(model) == ()
    assert watch.looks == 2
    conv._conv_forward = types.MethodType(_MIXING["_conv_forward"], conv)
    assert combined(watch.look(model)) == UNKNOWN
    del conv._conv_forward
    assert watch.look(model) == ()


def test_an_attribute_of_the_class_gives_way_when_a_call_begins():
    """It is no sign of anybody else, so forwards do not look for it."""
    model = tiny.build(SD).unet.requires_grad_(False)
    watch = Compatibility()
    conv = _layers(model)[0][0]
    assert watch.look(model) == ()
    del conv._reversed_padding_repeated_twice  # which zeros as padding do not need
    conv._conv_forward = types.MethodType(_MIXING["_conv_forward"], conv)
    watch.begin()
    assert combined(watch.look(model)) == UNKNOWN
