"""Functions that others put in the place of those of classes, instances and modules."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import types

import pytest
import tiny
import torch
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from numerics import relative
from torch.nn import functional

import pag_fast
from pag_fast import sharing

SD, SD3 = "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"
NETS = "StableDiffusionControlNetPAGPipeline"


@contextlib.contextmanager
def _put(owner, name, function):
    """``function`` at an attribute, for a while."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _call(name, pipe, **extra):
    return tiny.latents(pipe, tiny.call_kwargs(name, pipe, **extra))


def _warmer(own):
    return lambda self, *args, **kwargs: own(self, *args, **kwargs) * 1.05


def _tuples(own):
    def forward(self, *args, **kwargs):
        *rest, last = own(self, *args, **kwargs)
        last = tuple(x * 1.05 for x in last) if isinstance(last, tuple) else last * 1.05
        return (*rest, last)

    return forward


CLASSES = [
    (SD, ResnetBlock2D, _warmer),
    (SD, Attention, _warmer),
    (SD, FeedForward, _warmer),
    (SD, torch.nn.Linear, _warmer),
    (SD, CrossAttnDownBlock2D, _tuples),
    (SD3, JointTransformerBlock, _tuples),
    (NETS, ResnetBlock2D, _warmer),
]


@pytest.mark.filterwarnings("ignore:pag_fast")
@pytest.mark.parametrize(("name", "cls", "make"), CLASSES)
def test_a_forward_comes_onto_a_class_and_goes(name, cls, make):
    pipe = tiny.build(name)
    plain = _call(name, pipe)
    with _put(cls, "forward", make(cls.forward)):
        other = _call(name, pipe)
    assert relative(other, plain) > 1e-3
    pag_fast.patch(pipe)
    for _ in range(2):
        assert relative(_call(name, pipe), plain) < 1e-5
        with _put(cls, "forward", make(cls.forward)):
            assert relative(_call(name, pipe), other) < 1e-5


@pytest.mark.filterwarnings("ignore:pag_fast")
def test_a_forward_that_goes_in_a_callback():
    pipe, own = tiny.build(SD), ResnetBlock2D.forward

    def run():
        with _put(ResnetBlock2D, "forward", _warmer(own)):

            def back(pipe, step, timestep, kwargs):
                if step == 1:
                    ResnetBlock2D.forward = own
                return {}

            return _call(SD, pipe, steps=4, callback_on_step_end=back)

    stock = run()
    assert relative(_call(SD, pipe, steps=4), stock) > 1e-4
    pag_fast.patch(pipe)
    assert relative(run(), stock) < 1e-5


def _last_rows(own):
    """What a function gives, with the last third of its rows made larger."""

    @functools.wraps(own)
    def function(*args, **kwargs):
        out = own(*args, **kwargs).clone()
        out[2 * len(out) // 3 :] *= 1.3
        return out

    return function


def _places(pipe):
    """Where somebody could put a function that is no forward: owner and name."""
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    return {
        "a processor's class": (AttnProcessor2_0, "__call__"),
        "a method of the model": (pipe.unet, "process_encoder_hidden_states"),
        "a method of a layer": (attention, "head_to_batch_dim"),
        "a method of a class": (Attention, "prepare_attention_mask"),
        "torch": (functional, "group_norm"),
        "torch's attention": (functional, "scaled_dot_product_attention"),
        "a module of diffusers": (
            __import__("diffusers.models.resnet", fromlist=["_"]),
            "upsample_2d",
        ),
    }


_UNUSED = ("a method of a layer", "a method of a class", "a module of diffusers")


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("place", _places(tiny.build(SD)))
def test_functions_that_are_no_forward(place, patched_first):
    pipe = tiny.build(SD)
    owner, name = _places(pipe)[place]
    plain, function = _call(SD, pipe), _last_rows(getattr(owner, name))
    with _put(owner, name, function):
        stock = _call(SD, pipe)
    # nothing calls some of them in this model, which pag_fast does not know
    assert relative(stock, plain) > 1e-3 or place in _UNUSED
    if patched_first:
        pag_fast.patch(pipe)
        assert relative(_call(SD, pipe), plain) < 1e-5
    with _put(owner, name, function):
        if not patched_first:
            pag_fast.patch(pipe)
        with pytest.warns(UserWarning, match=f"{__name__}.*does not know|does not know.*"):
            assert relative(_call(SD, pipe), stock) < 1e-5
        assert not pipe._pag_fast.steps["shared"] or patched_first
    before = pipe._pag_fast.steps["shared"]
    assert relative(_call(SD, pipe), plain) < 1e-5
    assert pipe._pag_fast.steps["shared"] > before


def test_what_is_marked_is_shared():
    pipe, own = pag_fast.patch(tiny.build(SD)), functional.group_norm
    function = pag_fast.runtime.compatibility.row_wise(lambda *a, **k: own(*a, **k))
    with _put(functional, "group_norm", function):
        _call(SD, pipe)
    assert not pipe._pag_fast.steps["not shared"]


def test_kernels_of_attention_are_known():
    """They are put in the place of torch's, and compute every row by itself."""
    package = types.ModuleType("sageattention")
    package.own = functional.scaled_dot_product_attention
    code = "def sageattn(*args, **kwargs):\n    return own(*args, **kwargs)"
    exec(code, vars(package))
    pipe = tiny.build(SD)
    stock = _call(SD, pipe)
    pag_fast.patch(pipe)
    with _put(functional, "scaled_dot_product_attention", package.sageattn):
        assert relative(_call(SD, pipe), stock) < 1e-5
        told = str(pag_fast.explain(pipe))
        assert "scaled_dot_product_attention() of sageattention" in told
        assert (
            "branches stay shared; layers that are perturbed compute attention without it" in told
        )
    assert not pipe._pag_fast.steps["not shared"]


def test_methods_for_settings_are_nobodys_concern():
    """Packages that count downloads, for example, replace how models are saved."""
    pipe = tiny.build(SD)
    pipe.unet.save_pretrained = functools.partial(pipe.unet.save_pretrained, variant="fp16")
    pipe.unet.enable_freeu = lambda *args: None
    pag_fast.patch(pipe)
    _call(SD, pipe)
    assert not pipe._pag_fast.steps["not shared"]


_ALL = """
import contextlib, importlib, pkgutil, sys
from torch import nn
from pag_fast.runtime.compatibility.functions import foreign_functions
for root in ("diffusers.models", "peft"):
    for found in pkgutil.walk_packages(importlib.import_module(root).__path__, root + "."):
        with contextlib.suppress(Exception):  # some want what is not installed
            importlib.import_module(found.name)
of_models = {}
for name, module in list(sys.modules.items()):
    values = list(vars(module).values()) if name.split(".")[0] in ("diffusers", "peft") else []
    classes = [x for x in values if isinstance(x, type) and issubclass(x, nn.Module)]
    if any(x.__module__ == name for x in classes):
        of_models[name] = foreign_functions([vars(module)])
assert len(of_models) > 200 and "peft.utils.other" in of_models, len(of_models)
print({name: found for name, found in of_models.items() if found})
"""


def test_what_libraries_import_is_in_the_place_of_nothing():
    """Whatever class of theirs is in a model: an adapter of peft's brings its module along."""
    pytest.importorskip("peft")
    command = [sys.executable, "-W", "ignore", "-c", _ALL]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stdout + done.stderr


def _varargs(cls):
    class Own(cls):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return Own


def _renamed(cls):
    class Own(cls):
        def forward(self, x, t=None, **kwargs):
            return super().forward(x, t, **kwargs)

    return Own


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    ("name", "make"), [(SD, _varargs), (SD, _renamed), (NETS, _varargs), (SD3, _varargs)]
)
def test_a_subclass_whose_forward_names_no_arguments(name, make, marked):
    """The arguments have the names of diffusers' own class, by which they are cut and compared."""
    pipe = tiny.build(name)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    truth = _call(name, pipe)
    model.__class__ = make(type(model))
    assert relative(_call(name, pipe), truth) < 1e-6
    if marked:
        pag_fast.runtime.compatibility.row_wise(type(model))
    pag_fast.patch(pipe)
    if marked:
        assert relative(_call(name, pipe), truth) < 1e-5
        assert "shared" in pipe._pag_fast.steps
        return
    with pytest.warns(UserWarning, match=r"a class of test_functions_of_others \(Own\)"):
        assert relative(_call(name, pipe), truth) < 1e-5


@pytest.mark.parametrize("name", [SD, SD3])
def test_a_class_whose_forward_is_wrapped_from_the_beginning(name):
    """The names are those of what is wrapped, and nothing of it stays."""
    pipe = tiny.build(name)
    cls = type(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    truth, own = _call(name, pipe), cls.forward
    sharing.plan._argument_names.cache_clear()
    with _put(cls, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs)):
        pag_fast.patch(pipe)
        with pytest.warns(UserWarning, match="run apart"):
            assert relative(_call(name, pipe), truth) < 1e-5
    pipe = pag_fast.patch(tiny.build(name))
    assert relative(_call(name, pipe), truth) < 1e-5
    assert set(pipe._pag_fast.steps) == {"shared"}


def test_blocks_whose_forward_names_no_arguments():
    pipe = tiny.build(SD)
    truth = _call(SD, pipe)
    for block in pipe.unet.down_blocks:
        block.__class__ = pag_fast.runtime.compatibility.row_wise(_varargs(type(block)))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="has the unknown structure Own"):
        assert relative(_call(SD, pipe), truth) < 1e-5
