"""A call or a patch that fails leaves a pipeline as it was, whatever fails while it is undone."""

from __future__ import annotations

import diffusers
import pytest
import torch
from numerics import observing, relative
from states import CONTROL, NAMES, PAG, SD, build_pipe, inner, patch_pipe, run_pipe

import pag_fast
from pag_fast.runtime.access.entry import Entry
from pag_fast.runtime.injected import InjectedSession
from pag_fast.runtime.installation import Installation
from pag_fast.runtime.session import Session


class Injected(Exception):
    pass


# ---- errors ----


@pytest.mark.parametrize("where", ["enter_denoiser", "_combined", "_run", "forward", "combine"])
@NAMES
def test_an_error_anywhere(name, where, snapshot, monkeypatch):
    error = KeyboardInterrupt if name == SD else Injected
    pipe = patch_pipe(build_pipe(name))
    expected, before = run_pipe(pipe), snapshot(pipe)
    kind = InjectedSession if name == SD else Session
    if where == "combine" and name == SD:
        kind, where = InjectedSession, "predictions"

    def fail(*args, **kwargs):
        raise error("injected")

    with monkeypatch.context() as context, pytest.raises(error, match="injected"):
        context.setattr(kind, where, fail)
        run_pipe(pipe)
    assert snapshot(pipe) == before
    assert pipe._pag_fast.session is None
    assert torch.equal(run_pipe(pipe), expected)
    pag_fast.unpatch(pipe)
    assert "_compiled_call_impl" not in vars(pipe.unet)


UNDOING = [(Installation, "left"), (Installation, "forget"), (Session, "end")]


@pytest.mark.parametrize(("kind", "method"), UNDOING, ids=lambda x: str(getattr(x, "__name__", x)))
@NAMES
def test_the_first_error_wins_and_undoing_goes_on(name, kind, method, snapshot, monkeypatch):
    pipe = patch_pipe(build_pipe(name))
    expected, before = run_pipe(pipe), snapshot(pipe)
    own = getattr(kind, method)

    def fail(self, *args, **kwargs):
        own(self, *args, **kwargs)
        raise RuntimeError("in undoing")

    @observing
    def first(*_):
        raise Injected("injected")

    handle = inner(pipe).register_forward_hook(first)
    with monkeypatch.context() as context:
        context.setattr(kind, method, fail)
        with pytest.raises(Injected):
            run_pipe(pipe)
        handle.remove()
        with pytest.raises(RuntimeError, match="in undoing"):
            run_pipe(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(run_pipe(pipe), expected)


def test_unpatching_goes_on_when_a_part_of_it_fails(monkeypatch):
    pipe = patch_pipe(build_pipe(CONTROL))
    run_pipe(pipe)
    fusions, released = [x for _, x in pipe._pag_fast._fusions.values()], []
    release = type(fusions[0]).release

    def fail(self):
        raise RuntimeError("in undoing")

    def recorded(self):
        released.append(self)
        release(self)

    with monkeypatch.context() as context, pytest.raises(RuntimeError, match="in undoing"):
        context.setattr(Installation, "release", fail)
        context.setattr(type(fusions[0]), "release", recorded)
        pag_fast.unpatch(pipe)
    assert released == fusions
    assert type(pipe) is diffusers.StableDiffusionControlNetPipeline
    for model in (pipe.unet, pipe.controlnet):
        assert "_compiled_call_impl" not in vars(model)


# ---- failing patches ----

BAD = {
    "layers": {"layers": ["nothing"]},
    "option": {"layers": "mid", "pag_scale": float("nan")},
    "compiler": {"layers": "mid", "compile": pag_fast.CompileConfig(backend="eager")},
    "mode": {"layers": "mid", "rescale": 0.5, "rescale_mode": "nonsense"},
}


@pytest.mark.parametrize(
    ("name", "bad"), [*[(SD, bad) for bad in BAD], (PAG, "compiler"), (CONTROL, "compiler")]
)
def test_a_failing_patch_leaves_the_earlier_one(name, bad, snapshot, monkeypatch):
    def fail(*args, **kwargs):
        raise Injected("injected")

    # nothing else in this test compiles anything
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    pipe = patch_pipe(build_pipe(name))
    expected, before, state = run_pipe(pipe), snapshot(pipe), pipe._pag_fast
    with pytest.raises(Exception, match=r"."):
        pag_fast.patch(pipe, **BAD[bad])
    assert pipe._pag_fast is state
    assert isinstance(vars(pipe.unet)["_compiled_call_impl"], Entry)
    assert snapshot(pipe) == before
    assert relative(run_pipe(pipe), expected) < 1e-5
    with pytest.raises(Exception, match=r"."), pag_fast.patched(pipe, **BAD[bad]):
        pass
    assert pipe._pag_fast is state
    assert relative(run_pipe(pipe), expected) < 1e-5
    pag_fast.unpatch(pipe)
    assert "_compiled_call_impl" not in vars(pipe.unet)


def test_a_failing_compilation_leaves_nothing_compiled(monkeypatch):
    """Two models to compile, and the second fails."""
    pipe = build_pipe(CONTROL)
    expected = run_pipe(pipe)

    def fail(*args, **kwargs):
        raise Injected("injected")

    monkeypatch.setattr(pipe.controlnet, "compile", fail)
    with pytest.raises(Injected):
        pag_fast.patch(pipe, "mid", compile=pag_fast.CompileConfig(backend="eager"))
    assert not hasattr(pipe, "_pag_fast")
    assert vars(pipe.unet).get("_compiled_call_impl") is None
    assert torch.equal(run_pipe(pipe), expected)
