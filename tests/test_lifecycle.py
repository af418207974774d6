"""What a patched pipeline does in each of its states: running, in a forward, copied, compiled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import diffusers
import pytest
import torch
from numerics import relative
from states import (
    CONTROL,
    FLUX,
    NAMES,
    PAG,
    SAG,
    SD,
    build_pipe,
    in_forward,
    patch_pipe,
    run_pipe,
    with_callback,
)

import pag_fast
from pag_fast.fusion.packed_linears import _WHOLES
from pag_fast.runtime.access.entry import Entry

# ---- unpatch, patch and patched while a call runs ----


@pytest.mark.parametrize("when", ["between forwards", "in a forward"])
@pytest.mark.parametrize("what", ["unpatch", "patch", "patched", "end of patched"])
@NAMES
def test_a_running_pipeline_is_neither_unpatched_nor_patched(name, what, when, snapshot):
    pipe = patch_pipe(build_pipe(name))
    alone, before, seen = run_pipe(pipe), snapshot(pipe), []
    state = pipe._pag_fast

    def change():
        with pytest.raises(ValueError, match=r"is running and cannot be (un)?patched"):
            if what == "unpatch":
                pag_fast.unpatch(pipe)
            elif what == "patch":
                pag_fast.patch(pipe, "up")
            elif what == "patched":
                with pag_fast.patched(pipe, "up"):
                    pass
            else:
                context.__exit__(None, None, None)
        seen.append(1)

    if what == "end of patched":
        context = pag_fast.patched(pipe, "mid", **({} if name == PAG else {"pag_scale": 2.0}))
        context.__enter__()
        state = pipe._pag_fast
    got = (
        in_forward(pipe, change)
        if when == "in a forward"
        else run_pipe(pipe, **with_callback(change))
    )
    assert seen
    assert relative(got, alone) < 1e-6
    assert pipe._pag_fast is state
    assert snapshot(pipe) == before
    assert torch.equal(run_pipe(pipe), alone)


def test_a_running_sag_pipeline_is_not_unpatched():
    pipe, seen = patch_pipe(build_pipe(SAG)), []
    alone = run_pipe(pipe)

    def callback(step, timestep, latents):
        with pytest.raises(ValueError, match="is running and cannot be unpatched"):
            pag_fast.unpatch(pipe)
        with pytest.raises(ValueError, match="already running"):
            run_pipe(pipe)
        seen.append(step)

    assert torch.equal(run_pipe(pipe, callback=callback), alone)
    assert seen


# ---- copies ----

COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: _saved(x),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def _saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("name", "way"), [*[(SD, way) for way in COPIES], *[(x, "pickle") for x in (PAG, FLUX, SAG)]]
)
def test_a_copy_is_patched_and_its_own(name, way):
    pipe = build_pipe(name)
    stock = run_pipe(pipe)
    patch_pipe(pipe)
    expected = run_pipe(pipe)
    twin = COPIES[way](pipe)
    assert type(twin) is type(pipe)
    assert twin._pag_fast is not pipe._pag_fast
    assert relative(run_pipe(twin), expected) < 1e-5
    pag_fast.unpatch(twin)
    assert relative(run_pipe(twin), stock) < 1e-5
    assert relative(run_pipe(pipe), expected) < 1e-5
    pag_fast.unpatch(pipe)
    assert relative(run_pipe(pipe), stock) < 1e-5


@pytest.mark.parametrize("when", ["between forwards", "in a forward"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_while_a_call_runs(way, when):
    pipe = patch_pipe(build_pipe(SD), layers="up")
    expected, made = run_pipe(pipe), []

    def take():
        made.append(COPIES[way](pipe))
        made.append(COPIES[way](pipe.unet))

    if when == "in a forward":
        got = in_forward(pipe, take)
    else:
        # layers of the call are not the copy's
        run_pipe(pipe, pag_applied_layers="mid", **with_callback(take))
        got = expected
    assert relative(got, expected) < 1e-6
    assert relative(run_pipe(made[0]), expected) < 1e-5
    if len(made) > 1:
        assert not isinstance(vars(made[1]).get("_compiled_call_impl"), Entry)
        assert relative(_forward(made[1]), _forward(pipe.unet)) < 1e-6
    assert relative(run_pipe(pipe), expected) < 1e-5


def _forward(unet, rows=1):
    source = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=source) for s in ((rows, 4, 8, 8), (rows, 5, 12)))
    with torch.no_grad():
        return unet(x, 7, encoder_hidden_states=text).sample


@NAMES
def test_layers_of_a_call_are_not_a_copys(name):
    pipe = build_pipe(name)
    patch_pipe(pipe, layers="up")
    expected, made = run_pipe(pipe), []
    users = list(pipe.pag_applied_layers)
    take = with_callback(lambda: made.append(pickle.loads(pickle.dumps(pipe))))
    run_pipe(pipe, pag_applied_layers=["mid"], **take)
    assert list(pipe.pag_applied_layers) == list(made[0].pag_applied_layers) == users
    assert relative(run_pipe(made[0]), expected) < 1e-5
    stock = build_pipe(name)
    assert getattr(pag_fast.unpatch(made[0]), "pag_applied_layers", None) == getattr(
        stock, "pag_applied_layers", None
    )
    # what a callback chooses is for the calls that follow, whatever this one has named
    choose = with_callback(lambda: pipe.set_pag_applied_layers(["mid"]))
    run_pipe(pipe, pag_applied_layers=["down"], **choose)
    assert list(pipe.pag_applied_layers) == ["mid"]


@NAMES
def test_a_saved_pipeline_is_stocks(name, tmp_path):
    pipe, stock = build_pipe(name), build_pipe(name)
    expected = run_pipe(stock)
    patch_pipe(pipe)
    run_pipe(pipe)
    pipe.save_pretrained(tmp_path)
    missing = {part: x for part, x in stock.components.items() if x is None}
    there = getattr(diffusers, name).from_pretrained(tmp_path, **missing)
    there.set_progress_bar_config(disable=True)
    assert type(there) is getattr(diffusers, name)
    assert relative(run_pipe(there), expected) < 1e-6
    saved = {f.name for f in tmp_path.rglob("*.json")}
    assert "model_index.json" in saved
    assert "pag_fast" not in (tmp_path / "model_index.json").read_text("utf-8")


def test_a_setting_that_cannot_be_pickled_is_named():
    pipe = patch_pipe(build_pipe(SD), schedule=pag_fast.Schedule(per_step=lambda step: 1.0))
    expected = run_pipe(pipe)
    for way in (pickle.dumps, _saved):
        with pytest.raises(ValueError, match=r"per_step=.* cannot be pickled"):
            way(pipe)
    assert torch.equal(run_pipe(pipe), expected)


# ---- compiled and replaced models ----


def _as_compiled(module):
    """What ``module.compile()`` sets."""
    module._compiled_call_impl = lambda *args, **kwargs: module._call_impl(*args, **kwargs)


@NAMES
def test_a_model_compiled_while_patched(name):
    """Real compilers: test_compile.py."""
    pipe = build_pipe(name)
    stock = run_pipe(pipe)
    patch_pipe(pipe)
    expected = run_pipe(pipe)
    _as_compiled(pipe.unet)
    assert relative(run_pipe(pipe), expected) < 1e-5
    assert isinstance(vars(pipe.unet)["_compiled_call_impl"], Entry)
    pag_fast.unpatch(pipe)
    # the user's own is back
    assert not isinstance(vars(pipe.unet)["_compiled_call_impl"], Entry)
    assert vars(pipe.unet)["_compiled_call_impl"] is not None
    assert relative(run_pipe(pipe), stock) < 1e-5


BYPASSES = {
    "compiled": lambda pipe: _as_compiled(pipe.unet),
    "replaced": lambda pipe: setattr(pipe, "unet", copy.deepcopy(pipe.unet)),
}


@pytest.mark.parametrize("how", BYPASSES)
@NAMES
def test_a_model_that_passes_us_by_in_the_middle_of_a_call_is_told(name, how):
    pipe = patch_pipe(build_pipe(name))
    expected = run_pipe(pipe)
    with pytest.warns(UserWarning, match="the unet was compiled or replaced during the call"):
        run_pipe(pipe, steps=3, **with_callback(lambda: BYPASSES[how](pipe)))
    assert relative(run_pipe(pipe), expected) < 1e-5
    strict = patch_pipe(build_pipe(name), strict=True)
    with pytest.raises(ValueError, match="compiled or replaced during the call"):
        run_pipe(strict, steps=3, **with_callback(lambda: BYPASSES[how](strict)))
    assert relative(run_pipe(strict), expected) < 1e-5


@pytest.mark.parametrize("name", [SD, PAG, SAG])
def test_a_replaced_model_is_let_go_at_the_next_call(name):
    pipe = patch_pipe(build_pipe(name))
    expected, old = run_pipe(pipe), pipe.unet
    parameters = list(old.parameters())
    joined = any(w.contains(p) for w in list(_WHOLES.values()) for p in parameters)
    assert joined or name == SAG
    pipe.unet = copy.deepcopy(old)
    assert relative(run_pipe(pipe), expected) < 1e-5
    assert "_compiled_call_impl" not in vars(old)
    assert not any(w.contains(p) for w in list(_WHOLES.values()) for p in parameters)
    assert isinstance(vars(pipe.unet)["_compiled_call_impl"], Entry)
    gone = weakref.ref(old)
    del old, parameters
    gc.collect()
    assert gone() is None


def test_a_replaced_controlnet_is_let_go_at_the_next_call():
    pipe = patch_pipe(build_pipe(CONTROL))
    expected, old = run_pipe(pipe), pipe.controlnet
    pipe.controlnet = copy.deepcopy(old)
    assert relative(run_pipe(pipe), expected) < 1e-5
    assert "_compiled_call_impl" not in vars(old)
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None


# ---- what others capture in the middle of our forward ----


@NAMES
def test_captured_processors_do_not_stay(name, snapshot):
    """Whoever reads processors in our forward and sets them afterwards sets ours."""
    pipe = build_pipe(name)
    stock, before = run_pipe(pipe), snapshot(pipe)
    patch_pipe(pipe)
    expected, held = run_pipe(pipe), []
    attentions = [m for m in pipe.unet.modules() if hasattr(m, "get_processor")]

    def capture():
        held.extend((m, m.processor) for m in attentions)

    in_forward(pipe, capture)
    for module, processor in held:
        module.processor = processor
    assert relative(run_pipe(pipe), expected) < 1e-6
    for module, processor in held:
        module.processor = processor
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(run_pipe(pipe), stock)
