"""One compiled model, stock and patched in turns at equal shapes: no graph is taken for another."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from shallow import least
from tiny_hosts import HOSTS, call_kwargs, latents
from torch._dynamo.testing import CompileCounter

import pag_fast
from pag_fast.models.registry import uncompiled
from pag_fast.runtime.access.entry import Entry
from pag_fast.runtime.compiled.compilation import _repeated, enough_graphs
from pag_fast.sharing.plan import compiled_call

# a UNet and joint attention with CFG in one batch, which is traced fastest, and one without CFG
SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
SD3_PAG = "StableDiffusion3PAGPipeline"
_EAGER = pag_fast.CompileConfig(backend="eager")
WAYS = ("in place", "wrapped", "regional", "forward")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    # blocks that share their code have a graph each, and the user has allowed for it
    with enough_graphs():
        yield
    torch._dynamo.reset()


def make(name):
    return least(name)[0]


def layers_of(name):
    return least(name)[1]


def part_of(pipe):
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def compile_(pipe, how):
    """Compile the denoiser; returns what counts its graphs."""
    counter, part = CompileCounter(), part_of(pipe)
    model = getattr(pipe, part)
    if how == "in place":
        model.compile(fullgraph=True, backend=counter)
    elif how == "wrapped":
        setattr(pipe, part, torch.compile(model, fullgraph=True, backend=counter))
    elif how == "regional":
        for block in _repeated(model):
            block.compile(fullgraph=True, backend=counter)
    else:
        model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    return counter


def calls(name, pipe):
    """Arguments of a stock and a patched call whose forwards have equally many rows."""
    rows = 3 if name in (SD, SD3) else 2
    return call_kwargs(name, pipe, batch=rows, cfg=False), call_kwargs(name, pipe, cfg=rows == 3)


def expected(name):
    """What both calls return without a compiler."""
    pipe = make(name)
    stock = latents(pipe, calls(name, pipe)[0])
    pag_fast.patch(pipe, layers_of(name))
    return stock, latents(pipe, calls(name, pipe)[1])


def run(name, pipe, patched):
    return latents(pipe, calls(name, pipe)[patched])


def check(name, pipe, patched, eager):
    assert relative(run(name, pipe, patched), eager[patched]) < 1e-5


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((SD3, how) for how in WAYS),
        # test_compile.py has it in place
        (SD, "regional"),
        (FLUX, "forward"),
    ],
)
def test_stock_patched_stock_patched(name, how):
    eager, pipe = expected(name), make(name)
    counter = compile_(pipe, how)
    made = []
    for patched in (False, True, False, True, False):
        if patched:
            pag_fast.patch(pipe, layers_of(name))
        check(name, pipe, patched, eager)
        if patched:
            assert dict(pipe._pag_fast.steps) == {"shared": 2}
            pag_fast.unpatch(pipe)
        made.append(counter.frame_count)
    # one stock and one patched: what was patched before is patched with the same objects
    assert made[0] < made[1] == made[-1]
    assert made[-1] <= (6 if how == "regional" else 2)


# parts below an eager model: as where its forward is compiled
@pytest.mark.parametrize("how", [how for how in WAYS if how != "regional"])
def test_the_other_pipeline_of_a_compiled_model(how):
    """Patched all the time; a stock pipeline has the same model, and runs in turns with it."""
    eager, pipe = expected(SD3), make(SD3)
    counter = compile_(pipe, how)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    pag_fast.patch(pipe, layers_of(SD3))
    made = []
    for patched in (True, False, True, False):
        check(SD3, pipe if patched else other, patched, eager)
        made.append(counter.frame_count)
    assert made[1] == made[-1]


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_many_turns_are_two_graphs(how):
    """PyTorch gives a function eight graphs, and ``patched`` is used around single calls."""
    eager, pipe = expected(SD3), make(SD3)
    counter = compile_(pipe, how)
    with enough_graphs(8):
        for _ in range(5):
            with pag_fast.patched(pipe, layers_of(SD3)):
                check(SD3, pipe, True, eager)
            check(SD3, pipe, False, eager)
    assert counter.frame_count == 2


def test_what_is_kept_for_graphs_goes_with_them():
    pipe = make(SD3)
    compile_(pipe, "in place")
    with pag_fast.patched(pipe, layers_of(SD3)):
        run(SD3, pipe, True)
        (kept,) = (weakref.ref(x[1]) for x in pipe._pag_fast._installed.values())
    gc.collect()
    assert kept() is not None
    pipe.transformer._compiled_call_impl = None
    torch._dynamo.reset()
    gc.collect()
    assert kept() is None


def test_a_compiled_controlnet_in_turns():
    name = "StableDiffusionControlNetPipeline"
    pipe, layers = least(name)
    kwargs = dict(calls(name, pipe)[1])
    stock = latents(pipe, {**kwargs, "generator": torch.Generator().manual_seed(0)})
    graphs = CompileCounter()
    with pag_fast.patched(pipe, layers):
        eager = latents(pipe, {**kwargs, "generator": torch.Generator().manual_seed(0)})
    for part in ("unet", "controlnet"):
        getattr(pipe, part).compile(backend=graphs, fullgraph=True)
    made = []
    for _ in range(2):
        with pag_fast.patched(pipe, layers):
            out = latents(pipe, {**kwargs, "generator": torch.Generator().manual_seed(0)})
            assert relative(out, eager) < 1e-5
        out = latents(pipe, {**kwargs, "generator": torch.Generator().manual_seed(0)})
        assert relative(out, stock) < 1e-5
        made.append(graphs.frame_count)
    # a stock graph and a patched one of each
    assert made == [4, 4]


@pytest.mark.parametrize("how", WAYS)
def test_compiled_after_patching(how):
    """The user's module.compile() takes our place: it is behind us in the next call."""
    eager, pipe = expected(SD3), make(SD3)
    pag_fast.patch(pipe, layers_of(SD3))
    check(SD3, pipe, True, eager)
    counter = compile_(pipe, how)
    check(SD3, pipe, True, eager)
    made = counter.frame_count
    check(SD3, pipe, True, eager)
    assert counter.frame_count == made > 0
    pag_fast.unpatch(pipe)
    check(SD3, pipe, False, eager)
    check(SD3, pipe, False, eager)
    model = uncompiled(pipe.transformer)
    assert not isinstance(vars(model).get("_compiled_call_impl"), Entry)
    assert how != "in place" or compiled_call(model) is not None


def test_two_patched_pipelines_of_a_model_that_is_compiled_meanwhile():
    """One entry for both, whatever is put in its place, and the user's graph when both are gone."""
    eager, pipe = expected(SD3), make(SD3)
    layers = layers_of(SD3)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    pag_fast.patch(pipe, layers)
    compile_(pipe, "in place")
    own = compiled_call(pipe.transformer)
    pag_fast.patch(other, layers)
    for _ in range(2):
        check(SD3, pipe, True, eager)
        check(SD3, other, True, eager)
    entry = vars(pipe.transformer)["_compiled_call_impl"]
    assert len(entry.claims) == 2 and entry.displaced is own
    pag_fast.unpatch(pipe)
    check(SD3, other, True, eager)
    pag_fast.unpatch(other)
    assert vars(pipe.transformer)["_compiled_call_impl"] is own


def test_a_second_pipeline_compiles_and_lets_go():
    eager, pipe = expected(SD3), make(SD3)
    layers = layers_of(SD3)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    pag_fast.patch(pipe, layers)
    pag_fast.patch(other, layers, compile=_EAGER)
    assert compiled_call(pipe.transformer) is not None
    for _ in range(2):
        check(SD3, other, True, eager)
        check(SD3, pipe, True, eager)
    pag_fast.unpatch(other)
    assert compiled_call(pipe.transformer) is None
    check(SD3, pipe, True, eager)
    pag_fast.unpatch(pipe)
    assert "_compiled_call_impl" not in vars(pipe.transformer)
    check(SD3, pipe, False, eager)


@pytest.mark.parametrize("shared", [False, True])
@torch.compiler.set_stance("force_eager")  # whose graphs they are shows without tracing them
def test_what_the_user_compiles_over_ours_stays(shared):
    pipe = make(SD3)
    other = type(pipe)(**pipe.components)
    if shared:  # its entry stays on the model
        pag_fast.patch(other, layers_of(SD3))
    with pag_fast.patched(pipe, layers_of(SD3), compile=_EAGER):
        compile_(pipe, "in place")
        own = compiled_call(pipe.transformer)
        run(SD3, pipe, True)
    assert compiled_call(pipe.transformer) is own


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (SD3_PAG, "compiled"),
        ("StableDiffusionPAGPipeline", "replaced"),
        (SD3, "compiled"),
        (FLUX, "replaced"),
    ],
)
@torch.compiler.set_stance("force_eager")  # and what it is replaced by need not be traced
def test_a_denoiser_taken_away_in_a_callback_is_told_of(name, how):
    made = tiny_hosts if name in HOSTS else tiny
    pipe, other = make(name), make(name)
    part = part_of(pipe)
    own = getattr(pipe, part)

    def callback(pipe, step, timestep, tensors):
        if step == at and how == "compiled":
            getattr(pipe, part).compile(backend="eager")
        elif step == at:
            setattr(pipe, part, getattr(other, part))
        return tensors

    kwargs = {"steps": 3, "callback_on_step_end": callback}
    for at, strict in ((0, False), (2, True), (1, True)):
        setattr(pipe, part, own)
        pag_fast.patch(pipe, layers_of(name), strict=strict)
        if at == 2:  # nothing runs after it
            made.latents(pipe, made.call_kwargs(name, pipe, **kwargs))
        elif strict:
            with pytest.raises(ValueError, match="compiled or replaced during the call"):
                made.latents(pipe, made.call_kwargs(name, pipe, **kwargs))
        else:
            with pytest.warns(UserWarning, match="compiled or replaced during the call"):
                made.latents(pipe, made.call_kwargs(name, pipe, **kwargs))


@pytest.mark.parametrize(("name", "how"), [(SD, None), *((SD3, how) for how in (None, *WAYS))])
def test_rows_that_a_hook_in_front_changes(name, how):
    """Seen where the hook runs outside of the graph; inside of it the branches run apart."""

    def hook(model, args, kwargs):
        sample = args[0].clone() if args else kwargs["hidden_states"].clone()
        sample[-1] += 0.5
        if args:
            return (sample, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": sample}

    pictures = []
    for share in (False, True):
        pipe = make(name)
        if how is not None and share:
            compile_(pipe, how)
        model = uncompiled(getattr(pipe, part_of(pipe)))
        model.register_forward_pre_hook(hook, with_kwargs=True)
        pag_fast.patch(pipe, layers_of(name), share_branches=share)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures.append(run(name, pipe, True))
    assert relative(pictures[1], pictures[0]) < 1e-5


def test_a_patched_model_inside_of_a_graph_of_the_users():
    """Traced through the entry it is the stock model, also if it is compiled itself."""
    pipe = make(SD3)
    model = pipe.transformer
    x = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 10), torch.tensor([3, 3])
    stock = model(*x)[0]
    pag_fast.patch(pipe, layers_of(SD3))
    outer = torch.compile(
        lambda *args: model(*args, return_dict=False)[0], backend="eager", fullgraph=True
    )
    assert torch.equal(outer(*x), stock)
    run(SD3, pipe, True)
    assert torch.equal(outer(*x), stock)
    model.compile(backend="eager", fullgraph=True)
    run(SD3, pipe, True)
    assert torch.equal(outer(*x), stock)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(*x)[0], stock)
