"""Code of a user's own in the place of diffusers': it is followed, or refused by name.

A patch stands in for methods, properties, functions and processors. The truth is the stock pipeline
with the same code in it.
"""

from __future__ import annotations

import functools
import sys
import types

import diffusers
import pytest
import tiny_hosts
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from numerics import relative
from observed_steps import layers_of
from shallow import build
from tiny import call_kwargs, latents
from users import SD as HOST
from users import run_call

import pag_fast
from pag_fast.models.layer_names import resolve

SD, XL, SD3 = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusion3PAGPipeline",
)
PIPELINES = pytest.mark.parametrize("name", [SD, XL, SD3])
ADAPTIVE = {"pag_adaptive_scale": 0.005, "steps": 4}


def derived(pipe, **body):
    pipe.__class__ = type("Mine", (type(pipe),), body)
    return pipe


def _picture(name, prepare, *, patched=True, late=None, options=None, **kwargs):
    pipe = build(name)
    prepare(pipe)
    if patched:
        pag_fast.patch(pipe, strict=True, **(options or {}))
    if late is not None:
        late(pipe)
    return latents(pipe, call_kwargs(name, pipe, **kwargs))


def check(name, prepare, *, late=None, **kwargs):
    """Patched is what stock is with the same code, which makes a difference."""
    stock = _picture(name, prepare, patched=False, late=late, **kwargs)
    assert relative(_picture(name, prepare, late=late, **kwargs), stock) < 1e-5
    assert relative(_picture(name, lambda pipe: None, **kwargs), stock) > 1e-3


# ---- guidance ----


def _scale(self, t):
    return self.pag_scale * (1 + float(torch.as_tensor(t).flatten()[0]) / 500)


def _combine(self, noise_pred, cfg, guidance_scale, t, return_pred_text=False):
    out, cond = PAGMixin._apply_perturbed_attention_guidance(
        self, noise_pred, cfg, guidance_scale, t, True
    )
    return (0.5 * out, cond) if return_pred_text else 0.5 * out


_METHODS = {"_get_pag_scale": _scale, "_apply_perturbed_attention_guidance": _combine}


@PIPELINES
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("kwargs", [{}, ADAPTIVE], ids=["", "adaptive"])
def test_guidance_of_a_subclass(name, method, kwargs):
    check(name, lambda pipe: derived(pipe, **{method: _METHODS[method]}), **kwargs)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("when", ["prepare", "late"])
@pytest.mark.parametrize("kwargs", [{}, ADAPTIVE], ids=["", "adaptive"])
def test_guidance_on_the_instance(method, when, kwargs):
    def put_on(pipe):
        setattr(pipe, method, types.MethodType(_METHODS[method], pipe))

    check(SD, **{"prepare": lambda pipe: None, when: put_on}, **kwargs)


@pytest.mark.parametrize("method", _METHODS)
def test_guidance_replaced_for_everybody(method, monkeypatch):
    plain = _picture(SD, lambda pipe: None)
    own = getattr(PAGMixin, method)

    @functools.wraps(own)
    def replaced(*args, **kwargs):
        out = own(*args, **kwargs)
        return tuple(0.5 * x for x in out) if isinstance(out, tuple) else 0.5 * out

    # of the same name in its file, too
    replaced.__code__ = replaced.__code__.replace(co_name=method)
    monkeypatch.setattr(PAGMixin, method, replaced)
    stock = _picture(SD, lambda pipe: None, patched=False)
    assert relative(stock, plain) > 1e-3
    assert relative(_picture(SD, lambda pipe: None), stock) < 1e-5


@pytest.mark.parametrize(
    "properties",
    [
        {"do_pag_adaptive_scaling": property(lambda self: False)},
        {"do_pag_adaptive_scaling": False},
        {"pag_adaptive_scale": property(lambda self: 0.001)},
    ],
    ids=["off", "off, no property", "another scale"],
)
def test_properties_of_the_scale(properties):
    """``pag_adaptive_scale`` is of no use to stock while the call names none."""
    check(SD, lambda pipe: derived(pipe, **properties), **ADAPTIVE)


def test_a_property_that_stock_does_not_look_at():
    body = {"pag_adaptive_scale": property(lambda self: 0.004)}
    stock = _picture(SD, lambda pipe: derived(pipe, **body), patched=False, steps=4)
    assert relative(_picture(SD, lambda pipe: derived(pipe, **body), steps=4), stock) < 1e-5
    assert relative(_picture(SD, lambda pipe: None, steps=4), stock) < 1e-5


def test_a_wrapper_of_the_patched_combination_goes_on():
    """It is in front of ours, which has the options."""
    schedule = {"schedule": pag_fast.Schedule(sigma_end=5.0)}
    seen = []

    def wrap(pipe):
        own = pipe._apply_perturbed_attention_guidance

        def look(*args):
            seen.append(args[3])
            return own(*args)

        pipe._apply_perturbed_attention_guidance = look

    plain = _picture(SD, lambda pipe: None, options=schedule, steps=4)
    out = _picture(SD, lambda pipe: None, late=wrap, options=schedule, steps=4)
    assert len(seen) == 4 and relative(out, plain) < 1e-5
    assert relative(_picture(SD, lambda pipe: None, steps=4), plain) > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_options_that_a_function_on_the_instance_passes_over(steps):
    def put_on(pipe):
        own = functools.partial(_combine, pipe)
        pipe._apply_perturbed_attention_guidance = own

    options = {"schedule": pag_fast.Schedule(sigma_end=0.1)}
    with pytest.raises(ValueError, match=r"its own _apply_pert.*schedule=.*passed over"):
        _picture(SD, lambda pipe: None, late=put_on, options=options, steps=steps)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schedule", pag_fast.Schedule(adaptive=0.004)),
        ("reuse", pag_fast.Reuse(every=2)),
        ("rescale_mode", "snf"),
        ("branches", [pag_fast.Branch("mid", "identity", 1.0)]),
    ],
)
def test_options_of_a_combination_that_is_not_ours(option, value):
    pipe = derived(build(SD), _get_pag_scale=_scale)
    before = dict(vars(pipe)), type(pipe)
    with pytest.raises(ValueError, match=rf"Mine has its own _get_pag_scale.*{option}="):
        pag_fast.patch(pipe, **{option: value})
    assert (dict(vars(pipe)), type(pipe)) == before
    pipe = pag_fast.patch(build(SD), **{option: value})
    pipe._get_pag_scale = types.MethodType(_scale, pipe)
    with pytest.raises(ValueError, match=rf"its own _get_pag_scale.*{option}="):
        latents(pipe, call_kwargs(SD, pipe))
    del pipe._get_pag_scale
    assert torch.isfinite(latents(pipe, call_kwargs(SD, pipe))).all()


def test_a_function_put_on_in_between_and_taken_off():
    pipe = pag_fast.patch(build(SD))
    first = latents(pipe, call_kwargs(SD, pipe))
    pipe._get_pag_scale = types.MethodType(_scale, pipe)
    assert relative(latents(pipe, call_kwargs(SD, pipe)), first) > 1e-3
    del pipe._get_pag_scale
    assert torch.equal(latents(pipe, call_kwargs(SD, pipe)), first)


# ---- rescale ----


@pytest.mark.parametrize("name", [SD, XL])
@pytest.mark.parametrize("kwargs", [{}, {"guidance_rescale": 0.3}], ids=["", "with the argument"])
def test_a_rescale_of_a_subclass(name, kwargs):
    body = {"guidance_rescale": property(lambda self: 0.9)}
    check(name, lambda pipe: derived(pipe, **body), **kwargs)


def test_a_rescale_of_a_subclass_and_a_rescale_of_the_patch():
    pipe = derived(build(SD), guidance_rescale=property(lambda self: 0.9))
    pag_fast.patch(pipe, rescale_mode="full", rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.9 and the patch"):
        latents(pipe, call_kwargs(SD, pipe))


def _halved(own):
    return lambda a, b, guidance_rescale=0.0: 0.5 * own(a, b, guidance_rescale)


@pytest.mark.parametrize("name", [SD, XL])
def test_the_function_that_rescales_is_replaced(name, monkeypatch):
    module = sys.modules[getattr(diffusers, name).__module__]
    plain = _picture(name, lambda pipe: None, guidance_rescale=0.7)
    monkeypatch.setattr(module, "rescale_noise_cfg", _halved(module.rescale_noise_cfg))
    stock = _picture(name, lambda pipe: None, patched=False, guidance_rescale=0.7)
    assert relative(_picture(name, lambda pipe: None, guidance_rescale=0.7), stock) < 1e-5
    assert relative(plain, stock) > 1e-3


def test_a_loop_with_a_rescale_of_its_own():
    """A copy of the loop in a file of the user's, with another function for the same."""
    call = diffusers.StableDiffusionPAGPipeline.__call__.__wrapped__
    names = dict(
        call.__globals__, __name__="mine", mend=_halved(call.__globals__["rescale_noise_cfg"])
    )
    code = call.__code__
    renamed = tuple("mend" if x == "rescale_noise_cfg" else x for x in code.co_names)
    copied = types.FunctionType(
        code.replace(co_names=renamed), names, "__call__", call.__defaults__, call.__closure__
    )
    body = {"__call__": torch.no_grad()(copied)}
    check(SD, lambda pipe: derived(pipe, **body), guidance_rescale=0.7)


def test_callbacks_see_a_rescale_of_a_subclass():
    seen = []
    pipe = derived(build(SD), guidance_rescale=property(lambda self: self._guidance_rescale / 2))
    pag_fast.patch(pipe)

    def callback(pipe, i, t, tensors):
        seen.append(pipe.guidance_rescale)
        return tensors

    latents(pipe, call_kwargs(SD, pipe, guidance_rescale=0.6, callback_on_step_end=callback))
    assert set(seen) == {0.3}
    seen.clear()  # a call without PAG
    extra = {"guidance_rescale": 0.6, "callback_on_step_end": callback, "pag_scale": 0.0}
    latents(pipe, call_kwargs(SD, pipe, **extra))
    assert set(seen) == {0.3}


@pytest.mark.parametrize("name", [HOST, "StableDiffusionXLPipeline", "LTXPipeline"])
@pytest.mark.parametrize("rescale", [0.8, 0.0])
def test_a_rescale_of_a_subclass_without_pag(name, rescale):
    """Against the argument, too: 0.0 of a call that asks for 0.5."""
    given = {"guidance_rescale": 0.0 if rescale else 0.5}
    pipe = derived(tiny_hosts.build(name), guidance_rescale=property(lambda self: rescale))
    model = getattr(pipe, "unet", None) or pipe.transformer
    attentions = list(resolve(model, tiny_hosts.HOSTS[name].layers["middle"]).values())

    def run():
        return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, **given))

    kwargs = tiny_hosts.call_kwargs(name, pipe)
    with tiny_hosts.slow_pag(pipe, name, attentions, 3.0, tiny_hosts.HOSTS[name].cfg_scale(kwargs)):
        truth = run()
    layers = tiny_hosts.HOSTS[name].layers["middle"]
    with pag_fast.patched(pipe, layers, pag_scale=3.0, strict=True):
        assert relative(run(), truth) < 1e-5


def test_a_rescale_of_a_subclass_without_pag_and_one_of_the_patch():
    pipe = derived(tiny_hosts.build(HOST), guidance_rescale=property(lambda self: 0.8))
    pag_fast.patch(pipe, layers_of(HOST), rescale_mode="full", rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.8 and the patch"):
        run_call(pipe)


@pytest.mark.parametrize("body", [{"pag_scale": 2.0}, {"do_perturbed_attention_guidance": True}])
def test_pag_of_a_users_own(body):
    """What a patch adds would hide it."""
    pipe = derived(tiny_hosts.build(HOST), **body)
    with pytest.raises(ValueError, match=rf"Mine has its own {next(iter(body))}, which a patch"):
        pag_fast.patch(pipe, layers_of(HOST))
    assert type(pipe).__name__ == "Mine" and not hasattr(pipe, "_pag_fast")
