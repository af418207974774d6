"""As ``test_own_code.py``, of layers and processors, of Self-Attention Guidance, and what holds."""

from __future__ import annotations

import copy
import functools
import sys
import types

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.pipelines.pag.pag_utils import PAGMixin
from numerics import relative
from shallow import build
from test_own_code import SD, check, derived
from tiny import call_kwargs, latents
from tiny_sag import build_sag, sag_latents

import pag_fast
from pag_fast.runtime.own_code import is_diffusers, is_replaced


def test_layers_by_a_method_of_a_subclass():
    def choose(self, pag_applied_layers, do_classifier_free_guidance):
        PAGMixin._set_pag_attn_processor(self, ["attn"], do_classifier_free_guidance)

    pipe = derived(build(SD), _set_pag_attn_processor=choose)
    with pytest.raises(ValueError, match="Mine has its own _set_pag_attn_processor, which a patch"):
        pag_fast.patch(pipe)
    assert type(pipe).__name__ == "Mine"
    # put on the class of a patched pipeline it is seen as the call begins
    pipe = pag_fast.patch(derived(build(SD)))
    before = dict(vars(pipe.unet)), type(pipe)
    type(pipe)._set_pag_attn_processor = choose
    with pytest.raises(ValueError, match="Mine has its own _set_pag_attn_processor"):
        latents(pipe, call_kwargs(SD, pipe))
    assert (dict(vars(pipe.unet)), type(pipe)) == before
    del type(pipe)._set_pag_attn_processor
    assert torch.isfinite(latents(pipe, call_kwargs(SD, pipe))).all()


def test_layers_by_a_function_on_the_instance():
    """The loop finds it in front of ours: the call is stock's, and says so."""
    pipe = build(SD)
    pipe._set_pag_attn_processor = functools.partial(PAGMixin._set_pag_attn_processor, pipe)
    stock = latents(pipe, call_kwargs(SD, pipe))
    pag_fast.patch(pipe)
    with pytest.warns(UserWarning, match="its own _set_pag_attn_processor.*as stock does"):
        assert torch.equal(latents(pipe, call_kwargs(SD, pipe)), stock)
    pag_fast.patch(pipe, strict=True)
    latents(pipe, call_kwargs(SD, pipe, pag_scale=0.0))
    del pipe._set_pag_attn_processor
    assert relative(latents(pipe, call_kwargs(SD, pipe)), stock) < 1e-5


def test_layers_chosen_by_a_method_of_a_subclass():
    """It is asked after patching, too, and may choose others than it is given."""

    def choose(self, pag_applied_layers, *pair):
        PAGMixin.set_pag_applied_layers(
            self, ["up_blocks" if x == "up" else x for x in pag_applied_layers]
        )

    def late(pipe):
        pipe.set_pag_applied_layers(["up"])

    check(SD, lambda pipe: derived(pipe, set_pag_applied_layers=choose), late=late)
    pipe = pag_fast.patch(derived(build(SD), set_pag_applied_layers=choose))
    with pytest.raises(ValueError, match="sideways"):
        pipe.set_pag_applied_layers(["sideways"])
    assert pipe.pag_applied_layers == ["mid"]
    late(pipe)
    assert copy.deepcopy(pipe).pag_applied_layers == ["up_blocks"]


def test_processors_seen_by_a_property_of_a_subclass():
    pipe = derived(build(SD), pag_attn_processors=property(lambda self: {"mine": 1}))
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(pipe.pag_attn_processors)
        return tensors

    pag_fast.patch(pipe)
    latents(pipe, call_kwargs(SD, pipe, callback_on_step_end=callback))
    assert seen[0] == {"mine": 1}


class _Soft(PAGCFGIdentitySelfAttnProcessor2_0):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        others, perturbed = out.chunk(3)[:2], out.chunk(3)[2]
        return torch.cat([*others, 0.5 * perturbed + 0.5 * others[1]])


class PAGSoft(_Soft):
    pass


class PAGNamed(PAGCFGIdentitySelfAttnProcessor2_0):
    """Diffusers' own under another name."""

    def __init__(self, note=""):
        super().__init__()
        self.note = note


@pytest.mark.parametrize("kind", [_Soft, PAGSoft])
def test_processors_of_a_users_own(kind):
    pair = kind(), PAGIdentitySelfAttnProcessor2_0()
    message = rf"{kind.__name__} is not one of diffusers' PAG processors"
    pipe = build(SD)
    own = pipe._pag_attn_processors
    pipe.set_pag_applied_layers("mid", pair)
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe)
    assert type(pipe) is diffusers.StableDiffusionPAGPipeline
    pipe._pag_attn_processors = own
    pag_fast.patch(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.set_pag_applied_layers("mid", pair)
    assert pipe._pag_attn_processors is own
    pipe._pag_attn_processors = pair
    with pytest.raises(ValueError, match=message):
        latents(pipe, call_kwargs(SD, pipe))
    pipe._pag_attn_processors = own
    assert torch.isfinite(latents(pipe, call_kwargs(SD, pipe))).all()


def test_processors_derived_and_exchanged():
    pipe = build(SD)
    pipe._pag_attn_processors = PAGNamed(), pipe._pag_attn_processors[1]
    pag_fast.patch(pipe)
    pair = pipe._pag_attn_processors[::-1]
    with pytest.raises(ValueError, match="in the other's place: exchange them"):
        pipe.set_pag_applied_layers("mid", pair)
    pipe._pag_attn_processors = list(pair[::-1])
    assert torch.isfinite(latents(pipe, call_kwargs(SD, pipe))).all()


def test_processors_changed_for_everybody(monkeypatch):
    own = PAGCFGIdentitySelfAttnProcessor2_0.__call__

    @functools.wraps(own)
    def call(self, attn, hidden_states, *args, **kwargs):
        return 1.5 * own(self, attn, hidden_states, *args, **kwargs)

    pipe = pag_fast.patch(build(SD))
    monkeypatch.setattr(PAGCFGIdentitySelfAttnProcessor2_0, "__call__", call)
    with pytest.raises(ValueError, match="PAGCFGIdentitySelfAttnProcessor2_0 is not one of"):
        latents(pipe, call_kwargs(SD, pipe))
    with pytest.raises(ValueError, match="PAGCFGIdentitySelfAttnProcessor2_0 is not one of"):
        pag_fast.patch(build(SD))


# ---- what holds ----


def test_what_a_patch_does_not_stand_in_for():
    """Subclasses that override nothing, or other things, keep every option and drop rows."""

    def call(self, *args, **kwargs):
        return diffusers.StableDiffusionPAGPipeline.__call__(self, *args, **kwargs)

    doubled = property(lambda self: 2 * self._pag_scale)
    for body in ({}, {"__call__": call}, {"pag_scale": doubled}):
        pipe = pag_fast.patch(derived(build(SD), **body), strict=True)
        latents(pipe, call_kwargs(SD, pipe, steps=4, pag_adaptive_scale=0.02))
        assert pipe._pag_fast.steps["perturbed branch dropped"]
        pag_fast.patch(pipe, schedule=pag_fast.Schedule(sigma_end=0.5))
        twin = copy.deepcopy(pipe)
        assert torch.isfinite(latents(twin, call_kwargs(SD, twin))).all()


def test_a_copy_in_another_file_is_diffusers():
    """Community classes bring copies: of the same code, whatever their docstrings say."""
    own = PAGMixin._set_pag_attn_processor
    text = {"__name__": "community", **{k: v for k, v in own.__globals__.items() if k[0] != "_"}}
    consts = ("Another docstring.", *own.__code__.co_consts[1:])
    copied = types.FunctionType(own.__code__.replace(co_consts=consts), text, own.__name__)
    body = {"_set_pag_attn_processor": copied}
    cls = type("Mine", (diffusers.StableDiffusionPAGPipeline,), body)
    assert not is_replaced(cls, "_set_pag_attn_processor")
    assert not is_diffusers(copied, own.__name__)
    changed = types.FunctionType(PAGMixin._get_pag_scale.__code__, text, own.__name__)
    assert is_replaced(type("Mine", (cls,), {own.__name__: changed}), own.__name__)
    assert is_replaced(type("Mine", (cls,), {own.__name__: PAGMixin._get_pag_scale}), own.__name__)
    assert is_replaced(type("Mine", (cls,), {own.__name__: torch.no_grad()}), own.__name__)


# ---- Self-Attention Guidance ----

SAG = diffusers.StableDiffusionSAGPipeline
SAG_MODULE = sys.modules[SAG.__module__]
SAG_METHODS = ["pred_epsilon", "pred_x0", "prepare_ip_adapter_image_embeds", "sag_masking"]


@pytest.mark.parametrize("name", SAG_METHODS)
def test_methods_on_a_sag_pipeline(name):
    def put_on(pipe):
        setattr(pipe, name, functools.partial(getattr(SAG, name), pipe))

    pipe = build_sag()
    put_on(pipe)
    with pytest.raises(ValueError, match=rf"StableDiffusionSAGPipeline has its own {name}"):
        pag_fast.patch(pipe)
    delattr(pipe, name)
    first = sag_latents(pag_fast.patch(pipe))
    put_on(pipe)
    with pytest.raises(ValueError, match=rf"StableDiffusionSAGPipeline has its own {name}"):
        sag_latents(pipe)
    delattr(pipe, name)
    assert torch.equal(sag_latents(pipe), first)


@pytest.mark.parametrize("name", SAG_METHODS)
def test_methods_of_sag_replaced_for_everybody(name, monkeypatch):
    pipe, own = pag_fast.patch(build_sag()), getattr(SAG, name)

    @functools.wraps(own)
    def replaced(*args, **kwargs):
        return own(*args, **kwargs)

    monkeypatch.setattr(SAG, name, replaced)
    with pytest.raises(ValueError, match=rf"its own {name}, which a patch"):
        sag_latents(pipe)


class _Storing(SAG_MODULE.CrossAttnStoreProcessor):
    def __call__(self, *args, **kwargs):
        return 1.05 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        (SAG_MODULE, "gaussian_blur_2d", lambda img, kernel_size, sigma: img, "gaussian_blur_2d"),
        (
            SAG_MODULE.CrossAttnStoreProcessor,
            "__call__",
            _Storing.__call__,
            "CrossAttnStoreP.*call",
        ),
        (SAG_MODULE, "CrossAttnStoreProcessor", _Storing, "CrossAttnStoreProcessor"),
    ],
    ids=["blur", "call", "class"],
)
def test_functions_and_processors_of_sag(place, name, value, message, monkeypatch):
    pipe = pag_fast.patch(build_sag())
    with monkeypatch.context() as changed:
        changed.setattr(place, name, value)
        for refused in (lambda: sag_latents(pipe), lambda: pag_fast.patch(build_sag())):
            with pytest.raises(ValueError, match=rf"has its own {message}.*as diffusers wrote it"):
                refused()
    assert torch.isfinite(sag_latents(pipe)).all()
