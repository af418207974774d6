"""Wrappers that others put on ``type(pipe).__call__``, as caches do, in any order with patching."""

from __future__ import annotations

import functools

import pytest
import tiny
import tiny_hosts
from numerics import relative
from observed_steps import FLUX, SD, layers_of, run_call

import pag_fast

PAG = "StableDiffusionPAGPipeline"


def _call(name, pipe):
    module = tiny if name == PAG else tiny_hosts
    return module.latents(pipe, module.call_kwargs(name, pipe))


def _built(name):
    return (tiny if name == PAG else tiny_hosts).build(name)


def _patched(name, pipe):
    return pag_fast.patch(pipe, None if name == PAG else layers_of(name))


class _Wrapper:
    """As caches put it on: the former call is kept on the class, and comes back from there."""

    def __init__(self, pipe, seen):
        self.pipe = pipe
        cls, own = type(pipe), type(pipe).__call__

        @functools.wraps(own)
        def call(pipe, *args, **kwargs):
            seen.append(type(pipe).__name__)
            return own(pipe, *args, **{**kwargs, "guidance_scale": 2.0})

        cls._own_call, cls.__call__ = own, call

    def off(self):
        cls = type(self.pipe)
        cls.__call__ = cls._own_call
        del cls._own_call


@pytest.fixture(autouse=True)
def _as_it_was():
    import diffusers

    classes = [getattr(diffusers, name) for name in (PAG, SD, FLUX)]
    before = [dict(vars(cls)) for cls in classes]
    yield
    for cls, had in zip(classes, before, strict=True):
        assert vars(cls)["__call__"] is had["__call__"], f"{cls.__name__} is left wrapped"
        assert vars(cls).keys() == had.keys()


@pytest.mark.parametrize("name", [PAG, SD])
@pytest.mark.parametrize("order", ["on patch", "patch on"])
@pytest.mark.parametrize("end", ["off unpatch", "unpatch off"])
def test_put_on_and_taken_off(name, order, end):
    pipe, other, seen = _built(name), _built(name), []
    stock, plain = _call(name, pipe), _call(name, _patched(name, _built(name)))
    wrapper = _Wrapper(pipe, seen)
    stock_within = _call(name, pipe)
    wrapper.off()
    _patched(name, pipe)
    wrapper = _Wrapper(pipe, seen)
    within = _call(name, pipe)
    wrapper.off()
    pag_fast.unpatch(pipe)
    assert relative(within, plain) > 1e-3 < relative(stock_within, stock)
    if name == PAG:
        assert relative(within, stock_within) < 1e-5
    for what in order.split():
        if what == "on":
            wrapper = _Wrapper(pipe, seen)
        else:
            _patched(name, pipe)
    seen.clear()
    assert relative(_call(name, pipe), within) < 1e-6
    # as without us, it is on all pipelines of the class, and once
    assert relative(_call(name, other), stock_within) < 1e-6
    assert len(seen) == 2
    assert relative(_call(name, _patched(name, other)), within) < 1e-6
    for what in end.split():
        if what == "off":
            wrapper.off()
            wanted = plain if hasattr(pipe, "_pag_fast") else stock
            assert relative(_call(name, pipe), wanted) < 1e-5
        else:
            pag_fast.unpatch(pipe)
    assert relative(_call(name, pipe), stock) == 0.0
    assert relative(_call(name, other), plain) < 1e-6


def test_a_call_in_its_own_callback_is_still_refused():
    pipe, seen = _built(SD), []
    _patched(SD, pipe)
    wrapper = _Wrapper(pipe, seen)

    def callback(pipe, step, timestep, kwargs):
        _call(SD, pipe)

    try:
        with pytest.raises(ValueError, match="already running"):
            run_call(pipe, SD, callback_on_step_end=callback)
    finally:
        wrapper.off()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "order", ["patch on call off unpatch", "on patch call off unpatch", "patch on call unpatch off"]
)
def test_cache_dit(order):
    """The real one, which puts its wrapper on the class and takes it off from there."""
    cache_dit = pytest.importorskip("cache_dit")
    pipe = _built(FLUX)
    stock = run_call(pipe, FLUX, steps=4)
    config = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 0.5,
        "max_warmup_steps": 1,
    }
    for what in order.split():
        if what == "patch":
            pag_fast.patch(pipe, layers_of(FLUX))
        elif what == "unpatch":
            pag_fast.unpatch(pipe)
        elif what == "on":
            cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**config))
        elif what == "off":
            cache_dit.disable_cache(pipe)
        else:
            assert relative(run_call(pipe, FLUX, steps=4), stock) > 1e-3
    assert relative(run_call(pipe, FLUX, steps=4), stock) == 0.0
