"""A call's arguments are observed, in subclasses, under decorators and in loops of others."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap

import pytest
import tiny_hosts
import torch
from numerics import relative
from observed_steps import FLUX, QWEN, SCALE, SD, WAN, built_once, layers_of, run_call, slow_steps
from tiny_hosts import HOSTS

import pag_fast
from pag_fast.models.layer_names import resolve


def _source(base, *changes):
    """The class's own loop, copied into a function, with changes."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(base.__call__)))
    source = source[source.index("def __call__") :]
    for old, new in changes:
        source, found = re.subn(old, new, source)
        assert found, old
    space = dict(vars(inspect.getmodule(base)))
    exec(compile("from __future__ import annotations\n" + source, "<copied>", "exec"), space)
    return torch.no_grad()(space[re.search(r"def (\w+)", source)[1]])


def _super(base):
    class Sub(base):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    return Sub


def _by_name(base):
    class Sub(base):
        def __call__(self, extra=None, **kwargs):
            self.seen = extra
            return base.__call__(self, **kwargs)

    return Sub


def _defaults(base):
    class Sub(base):
        def __call__(self, guidance_scale=5.0, true_cfg_scale=5.0, **kwargs):
            cfg = HOSTS[base.__name__].cfg
            scale = guidance_scale if cfg == "guidance_scale" else true_cfg_scale
            return super().__call__(**{**kwargs, cfg: scale})

    return Sub


def _wrapped(base):
    def decorator(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    class Sub(base):
        __call__ = decorator(decorator(base.__call__))

    return Sub


def _hidden(base):
    def decorator(function):
        return lambda this, *args, **kwargs: function(this, *args, **kwargs)

    class Sub(base):
        @decorator
        def __call__(self, **kwargs):
            return super().__call__(**kwargs)

    return Sub


def _copied(base, *changes):
    return type("Sub", (base,), {"__call__": _source(base, *changes)})


def _renamed(base):
    """Another variable counts the steps, and ``i`` is something else."""
    return _copied(
        base,
        (r"\bi\b(?!f)", "number"),
        (r"(\n    )(device = self\._execution_device)", r"\1i = 7\1\2"),
    )


def _other_function(base):
    return _copied(base, (r"def __call__", "def generate"))


SUBCLASSES = [_super, _by_name, _defaults, _wrapped, _hidden]
LOOPS = [_copied, _renamed, _other_function]


def _as(pipe, make):
    made = make(type(pipe))(**pipe.components, **_more(pipe))
    made.set_progress_bar_config(disable=True)
    return made


def _more(pipe):
    parameters = inspect.signature(type(pipe).__init__).parameters
    return {k: False for k in ("requires_safety_checker", "add_watermarker") if k in parameters}


@pytest.mark.parametrize("make", [*SUBCLASSES, *LOOPS])
@pytest.mark.parametrize("name", [SD, FLUX, WAN])
def test_subclasses(name, make):
    pipe = built_once(name)
    with slow_steps(pipe, name):
        truth = run_call(pipe, name)
    made = _as(pipe, make)
    with pag_fast.patched(made, layers_of(name), pag_scale=SCALE, strict=True):
        extra = {HOSTS[name].cfg: None} if make is _defaults else {}
        assert relative(run_call(made, name, **extra), truth) < 1e-5
        assert sum(made._pag_fast.steps.values()) == 3


@pytest.mark.skipif(QWEN not in HOSTS, reason=f"this diffusers has no {QWEN} that fits")
@pytest.mark.parametrize("make", [*SUBCLASSES, *LOOPS])
def test_subclasses_where_the_scale_has_to_be_known(make):
    pipe = built_once(QWEN)
    attentions = list(resolve(pipe.transformer, layers_of(QWEN)).values())
    with tiny_hosts.slow_pag(pipe, QWEN, attentions, SCALE, 5.0):
        truth = run_call(pipe, QWEN)
    made = _as(pipe, make)
    extra = {HOSTS[QWEN].cfg: None} if make is _defaults else {}
    with pag_fast.patched(made, layers_of(QWEN), pag_scale=SCALE, strict=True):
        if make in LOOPS:  # nobody knows what its variables mean
            with pytest.raises(ValueError, match="call the pipeline's own __call__"):
                run_call(made, QWEN, **extra)
        else:
            assert relative(run_call(made, QWEN, **extra), truth) < 1e-5
