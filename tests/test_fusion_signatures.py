"""The signatures of attention processors at hand: what diffusers asks for in every attention."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from numerics import relative
from tiny import build, call_kwargs, latents
from torch import nn

import pag_fast
from pag_fast.fusion.signatures import asks_for_signature, signed

UNET = "StableDiffusionPAGPipeline"


def _attention(processor=None):
    attention = Attention(query_dim=8, heads=2, dim_head=4).eval()
    attention.set_processor(AttnProcessor2_0() if processor is None else processor)
    return attention


def _put(attention):
    own, name, value = signed(attention)
    own[name] = value
    return value


def test_a_signature_is_python_s_own_and_the_call_is_the_class_s():
    attention = _attention()
    before = inspect.signature(attention.processor.__call__)
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = attention(x)
        value = _put(attention)
        assert attention.processor.__call__ is value and asks_for_signature(attention)
        assert inspect.signature(value) == before
        assert value.__name__ == "__call__" and value.__self__ is attention.processor
        assert torch.equal(attention(x), expected)
        assert torch.equal(value(attention, x), expected)


def test_each_attention_asks_for_it_once(monkeypatch):
    pipe = build(UNET)
    asked = []
    build_signature = inspect._signature_from_function
    monkeypatch.setattr(
        inspect,
        "_signature_from_function",
        lambda *args, **kwargs: asked.append(args[1]) or build_signature(*args, **kwargs),
    )
    mine = lambda: sum(f.__qualname__ == "AttnProcessor2_0.__call__" for f in asked)  # noqa: E731
    latents(pipe, call_kwargs(UNET, pipe))
    stock = mine()
    assert stock > 10
    pag_fast.patch(pipe)
    latents(pipe, call_kwargs(UNET, pipe))
    asked.clear()
    latents(pipe, call_kwargs(UNET, pipe))
    assert mine() == 0
    assert not any("__call__" in vars(p) for p in pipe.unet.attn_processors.values())


class Extra(AttnProcessor2_0):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def _loud(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, loud=1.0):
    call = AttnProcessor2_0.__call__
    return loud * call(self, attn, hidden_states, encoder_hidden_states, attention_mask)


def test_a_function_put_on_the_class_is_followed(monkeypatch):
    """What ``cross_attention_kwargs`` are handed on goes by the function that runs."""
    pipe = build(UNET)
    pipe.unet.set_attn_processor({name: Extra() for name in pipe.unet.attn_processors})
    pag_fast.runtime.compatibility.row_wise(Extra)
    pag_fast.patch(pipe)

    def pictures():
        kwargs = {**call_kwargs(UNET, pipe), "cross_attention_kwargs": {"loud": 0.5}}
        return latents(pipe, kwargs)

    before = pictures()
    monkeypatch.setattr(Extra, "__call__", _loud)
    after = pictures()
    stock = build(UNET)
    stock.unet.set_attn_processor({name: Extra() for name in stock.unet.attn_processors})
    expected = latents(stock, {**call_kwargs(UNET, stock), "cross_attention_kwargs": {"loud": 0.5}})
    assert relative(after, expected) < 1e-5 < relative(before, expected)


def test_a_processor_s_own_call_is_left_alone():
    attention = _attention()
    attention.processor.__call__ = _loud.__get__(attention.processor)
    assert signed(attention) is None


class Slots:
    __slots__ = ()

    def __call__(self, attn, hidden_states):
        return hidden_states


class Unhashable:
    __hash__ = None

    def __call__(self, attn, hidden_states):
        return hidden_states


class Layer(nn.Module):
    def __call__(self, attn, hidden_states):
        return hidden_states


@pytest.mark.parametrize("make", [Slots, Unhashable, Layer, lambda: lambda attn, x: x])
def test_other_processors_are_left_to_python(make):
    assert signed(_attention(make())) is None


def test_copies_and_models_that_share_a_processor():
    first, second = _attention(), _attention()
    second.set_processor(first.processor)
    value = _put(first)
    copied = copy.deepcopy(first)
    assert copied.processor.__call__.__self__ is copied.processor
    assert not isinstance(copied.processor.__call__, type(value))
    # another model of the same processor, whose forward begins while this one's runs
    own, name, again = signed(second)
    assert again is value and own is vars(first.processor) and name == "__call__"


def test_two_pipelines_with_one_processor_leave_nothing_on_it():
    """Forwards of both run at the same time, and end in any order."""
    processor = AttnProcessor2_0()
    pipes = [build(UNET) for _ in range(2)]
    for pipe in pipes:
        pipe.unet = copy.deepcopy(pipe.unet)
        pipe.unet.set_attn_processor(processor)
    expected = [latents(pipe, call_kwargs(UNET, pipe)) for pipe in pipes]
    for pipe in pipes:
        pag_fast.patch(pipe)
    found: list = [None, None]

    def run(index):
        for _ in range(3):
            found[index] = latents(pipes[index], call_kwargs(UNET, pipes[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        assert relative(got, want) < 1e-5
    assert vars(processor) == {}


def test_a_processor_is_freed():
    attention = _attention()
    signed(attention)
    gone = weakref.ref(attention.processor)
    del attention
    gc.collect()
    assert gone() is None
