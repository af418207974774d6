"""HiDream: an encoder's layers in front of rows, experts, and pictures that are no squares."""

from __future__ import annotations

import re

import pytest
import tiny_hosts
from numerics import relative
from tiny_hosts import HOSTS, call_kwargs, latents
from tiny_hosts.reference import slow_pag

import pag_fast
from pag_fast import CompileConfig
from pag_fast.models.layer_names import resolve

NAME = "HiDreamImagePipeline"
LAYERS = HOSTS[NAME].layers["middle"]
_LLAMA = "prompt_embeds_llama3"


def _slow(pipe, kwargs, layers=LAYERS):
    attentions = list(resolve(pipe.transformer, layers).values())
    with slow_pag(pipe, NAME, attentions, 3.0, HOSTS[NAME].cfg_scale(kwargs)):
        return latents(pipe, kwargs)


@pytest.mark.parametrize("layer", [r"double_stream_blocks\.2\.", r"single_stream_blocks\.1\."])
def test_text_is_put_between_blocks_in_front_of_the_fork(layer):
    """The model's own code has text of all rows there."""
    pipe = tiny_hosts.build(NAME)
    truth = _slow(pipe, call_kwargs(NAME, pipe), [layer])
    with pag_fast.patched(pipe, [layer], pag_scale=3.0):
        assert relative(latents(pipe, call_kwargs(NAME, pipe)), truth) < 1e-5
        assert set(pipe._pag_fast.steps) == {"shared"}


def test_a_picture_that_is_no_square():
    """The model pads it to the most tokens that it takes, and hides those of no key."""
    pipe = tiny_hosts.build(NAME)
    pipe.transformer.max_seq = 16  # what the reference takes for the picture's tokens

    def kwargs():
        return call_kwargs(NAME, pipe) | {"height": 128, "width": 32}

    made = latents(pipe, kwargs())
    assert made.shape[-2] != made.shape[-1]
    truth = _slow(pipe, kwargs())
    assert relative(truth, made) > 1e-3, "PAG makes no difference here"
    with pag_fast.patched(pipe, LAYERS, pag_scale=3.0):
        assert relative(latents(pipe, kwargs()), truth) < 1e-5


def test_another_prompt_in_the_middle_of_a_call():
    """What a callback puts in the place of the prompt is seen, whichever of its dimensions."""
    pipe = tiny_hosts.build(NAME)

    def kwargs():
        def other(pipe, step, timestep, found):
            return {_LLAMA: found[_LLAMA].flip(-1)} if step == 0 else {}

        more = {"callback_on_step_end": other, "callback_on_step_end_tensor_inputs": [_LLAMA]}
        return call_kwargs(NAME, pipe, steps=3) | more

    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, _LLAMA]
    truth = _slow(pipe, kwargs())
    with pag_fast.patched(pipe, LAYERS, pag_scale=3.0):
        assert relative(latents(pipe, kwargs()), truth) < 1e-5
        without = call_kwargs(NAME, pipe, steps=3)
        assert relative(latents(pipe, without), truth) > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": CompileConfig(backend="eager")}, "cannot be compiled as a whole: use compile"),
        ({"graphs": True}, "cannot be captured as a whole: use graphs=False"),
    ],
)
def test_graphs_are_refused(options, words):
    """Which expert gets which token is asked for in the middle of a forward."""
    pipe = tiny_hosts.build(NAME)
    with pytest.raises(ValueError, match=re.escape(words)):
        pag_fast.patch(pipe, LAYERS, **options)
        latents(pipe, call_kwargs(NAME, pipe))
