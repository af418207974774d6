"""A model has one user at a time, and everybody else gets it as it is."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import observing, relative
from shallow import SHALLOW, build, least

import pag_fast
from pag_fast.runtime import lease as leases
from pag_fast.runtime.entry import Entry

SD, PAG, FLUX = "StableDiffusionPipeline", "StableDiffusionPAGPipeline", "FluxPipeline"
CONTROL = "StableDiffusionControlNetPipeline"
STEPS = 3


def _module(name):
    return tiny if name in tiny.PIPELINES else tiny_hosts


def _run(pipe, name=SD, **extra):
    module = _module(name)
    extra.setdefault("steps", STEPS)
    out = pipe(**module.call_kwargs(name, pipe, **extra))
    return out.images


def _sibling(pipe, name=SD, **parts):
    cls = getattr(diffusers, name)
    known = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **parts}
    extra = {"requires_safety_checker": False} if "safety_checker" in known else {}
    if name == PAG:
        extra["pag_applied_layers"] = ["mid"]
    made = cls(**known, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _layer(name):
    return [r"single_transformer_blocks\.1\."] if name == FLUX else ["mid"]


def _patched(pipe, name=SD, **options):
    if name == PAG:
        return pag_fast.patch(pipe, "mid", **options)
    return pag_fast.patch(pipe, _layer(name), pag_scale=2.0, **options)


def _once(callback, step=0):
    """A callback that runs ``callback()`` behind one step."""

    def on_step_end(pipe, i, t, tensors):
        if i == step:
            callback()
        return {}

    return {"callback_on_step_end": on_step_end}


def _in_thread(run):
    """What ``run()`` returns in a thread of its own; its error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(120)


# ---- a stock pipeline on the same model ----


@pytest.mark.parametrize("name", [SD, FLUX, PAG])
@pytest.mark.parametrize("thread", [False, True], ids=["callback", "thread"])
def test_a_stock_sibling_in_a_callback(name, thread):
    pipe = build(name)
    sibling = _sibling(pipe, name)
    stock, seen = _run(sibling, name), []
    _patched(pipe, name)
    alone = _run(pipe, name)
    assert relative(alone, stock) > 1e-3 or name == PAG

    def other():
        run = functools.partial(_run, sibling, name)
        seen.append(_in_thread(run) if thread else run())

    together = _run(pipe, name, **_once(other, 1))
    assert torch.equal(seen[0], stock)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", [SD, FLUX])
def test_stock_siblings_in_threads_all_the_while(name):
    pipe = build(name)
    siblings = [_sibling(pipe, name) for _ in range(3)]
    stock = _run(siblings[0], name)
    _patched(pipe, name)
    alone = _run(pipe, name)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(_run, s, name) for s in siblings]
        ours = pool.submit(lambda: [_run(pipe, name) for _ in range(3)])
        assert all(torch.equal(x.result(120), stock) for x in others)
        assert all(torch.equal(x, alone) for x in ours.result(120))


def test_forwards_of_a_thread_pool_do_not_starve_a_call():
    """Forwards that overlap without end once kept the model from ever being free."""
    pipe = _patched(build(SD))
    alone, stop = _run(pipe), threading.Event()
    source = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=source) for s in ((1, 4, 8, 8), (1, 5, 12)))

    @torch.no_grad()
    def forward():
        return pipe.unet(x, 7, encoder_hidden_states=text).sample

    expected = forward()

    def forwards():
        right = True
        while not stop.is_set():
            right = right and torch.equal(forward(), expected)
        return right

    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(forwards) for _ in range(4)]
        try:
            ours = pool.submit(_run, pipe).result(60)
        finally:
            stop.set()
        assert all(other.result(60) for other in others)
    assert torch.equal(ours, alone)


@pytest.mark.parametrize("name", [SD, PAG])
def test_a_stock_sibling_inside_a_hook_of_our_forward(name):
    """In the middle of our forward the model is stock for everybody else."""
    pipe = build(name)
    sibling, seen = _sibling(pipe, name), []
    stock = _run(sibling, name, steps=1)

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            seen[0] = _run(sibling, name, steps=1)

    _patched(pipe, name)
    alone = _run(pipe, name)
    inner = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    for module in (inner, pipe.unet):
        seen.clear()
        handle = module.register_forward_hook(hook)
        together = _run(pipe, name)
        handle.remove()
        assert torch.equal(seen[0], stock)
        assert relative(together, alone) < 1e-5


@pytest.mark.parametrize("name", [SD, PAG])
def test_our_forward_entered_again_by_a_hook_is_nobodys(name):
    """A hook that runs the denoiser by itself, inside of a forward of the loop."""
    pipe = build(name)
    source = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=source) for s in ((3, 4, 8, 8), (3, 5, 12)))

    def forward():
        with torch.no_grad():
            return pipe.unet(x, 7, encoder_hidden_states=text).sample

    expected, seen, inside = forward(), [], []
    _patched(pipe, name)
    alone = _run(pipe, name)

    @observing
    def hook(*_):
        if not inside:
            inside.append(1)
            seen.append(forward())
            inside.clear()

    inner = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    handle = inner.register_forward_hook(hook)
    together = _run(pipe, name)
    handle.remove()
    assert len(seen) >= STEPS
    assert all(torch.equal(x, expected) for x in seen)
    assert relative(together, alone) < 1e-5


# ---- forwards that are nobody's ----


class _Object:
    def __init__(self, run):
        self.run = run

    def __call__(self, pipe, i, t, tensors):
        self.run()
        return {}


def _callbacks(run):
    def plain(pipe, i, t, tensors):
        run()
        return {}

    def with_more(more, pipe, i, t, tensors):
        return plain(pipe, i, t, tensors)

    class Decorated(_Object):
        @torch.no_grad()
        def __call__(self, pipe, i, t, tensors):
            return super().__call__(pipe, i, t, tensors)

    return {
        "function": plain,
        "partial": functools.partial(with_more, 1),
        "decorated": torch.no_grad()(plain),
        "object": _Object(run),
        "decorated object": Decorated(run),
        "method": _Object(run).__call__,
    }


@pytest.mark.parametrize("kind", list(_callbacks(None)))
@pytest.mark.parametrize("name", [SD, PAG])
def test_a_callback_that_runs_the_model_itself(name, kind):
    pipe = build(name)
    source = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=source) for s in ((3, 4, 8, 8), (3, 5, 12)))

    def forward():
        with torch.no_grad():
            return pipe.unet(x, 7, encoder_hidden_states=text).sample

    expected, seen = forward(), []
    _patched(pipe, name)
    alone = _run(pipe, name)
    callback = _callbacks(lambda: seen.append(forward()))[kind]
    together = _run(pipe, name, callback_on_step_end=callback)
    assert len(seen) == STEPS
    assert all(torch.equal(x, expected) for x in seen)
    assert torch.equal(together, alone)


def test_a_loop_of_the_users_own_is_stock():
    pipe = build(SD)

    @torch.no_grad()
    def loop():
        source = torch.Generator().manual_seed(0)
        x, text = (torch.randn(s, generator=source) for s in ((1, 4, 8, 8), (2, 5, 12)))
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            u, c = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
            x = pipe.scheduler.step(u + 5 * (c - u), t, x).prev_sample
        return x

    stock = loop()
    _patched(pipe)
    assert torch.equal(loop(), stock)
    _run(pipe)
    assert torch.equal(loop(), stock)


# ---- two patched pipelines on one model ----


def _two(names=(SD, PAG)):
    first = build(names[0])
    second = _sibling(first, names[1])
    alone = []
    for pipe, name in zip((first, second), names, strict=True):
        _patched(pipe, name)
        alone.append(_run(pipe, name))
        pag_fast.unpatch(pipe)
    for pipe, name in zip((first, second), names, strict=True):
        _patched(pipe, name)
    return (first, second), alone


PAIRS = pytest.mark.parametrize("names", [(SD, SD), (SD, PAG), (PAG, SD), (FLUX, FLUX)], ids=str)


@PAIRS
def test_two_patched_pipelines_in_turns_and_nested(names, snapshot):
    (first, second), alone = _two(names)
    for _ in range(2):
        assert relative(_run(first, names[0]), alone[0]) < 1e-5
        assert relative(_run(second, names[1]), alone[1]) < 1e-5
    seen = []
    nested = _once(lambda: seen.append(_run(second, names[1])), 1)
    assert relative(_run(first, names[0], **nested), alone[0]) < 1e-5
    assert relative(seen[0], alone[1]) < 1e-5
    # one goes, the other stays
    before = snapshot(first)
    pag_fast.unpatch(second)
    assert relative(_run(first, names[0]), alone[0]) < 1e-5
    assert snapshot(first) == before
    pag_fast.unpatch(first)
    assert "_compiled_call_impl" not in vars(_model(first))
    assert not torch.equal(_run(first, names[0]), alone[0])


@PAIRS
def test_two_patched_pipelines_in_two_threads(names):
    pipes, alone = _two(names)
    start = threading.Barrier(2)

    def run(pipe, name):
        start.wait(60)
        return [_run(pipe, name) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, *pair) for pair in zip(pipes, names, strict=True)]
        for one, expected in zip(runs, alone, strict=True):
            assert all(relative(x, expected) < 1e-5 for x in one.result(120))


def test_a_patched_pipeline_that_nobody_has_any_more_is_let_go():
    (first, second), alone = _two()
    model = first.unet
    entry = vars(model)["_compiled_call_impl"]
    assert len(entry.claims) == 2
    del first
    gc.collect()
    assert len(entry.claims) == 1
    assert torch.equal(_run(second, PAG), alone[1])
    del second
    gc.collect()
    assert "_compiled_call_impl" not in vars(model)


def test_four_kinds_of_users_of_one_unet():
    """PAG, PAG injected, SAG and stock: in turns, nested in one another, and none is left."""
    names = [PAG, SD, "StableDiffusionSAGPipeline"]
    base = tiny.build(PAG)
    pipes = [_sibling(base, name) for name in names]

    def run(pipe, name):
        extra = {"sag_scale": 0.7} if "SAG" in name else {}
        if "SAG" in name:
            kwargs = tiny_hosts.call_kwargs(SD, pipe, steps=STEPS)
            return pipe(**kwargs, **extra).images
        return _run(pipe, name)

    stock = run(_sibling(base, SD), SD)
    alone = []
    for pipe, name in zip(pipes, names, strict=True):
        pag_fast.patch(pipe, **({} if "SAG" in name else {"layers": "mid"}))
        alone.append(run(pipe, name))
        pag_fast.unpatch(pipe)
    for pipe, name in zip(pipes, names, strict=True):
        pag_fast.patch(pipe, **({} if "SAG" in name else {"layers": "mid"}))
    for outer in range(2):
        seen = []

        def nested(seen=seen, outer=outer):
            for i, (pipe, name) in enumerate(zip(pipes, names, strict=True)):
                seen.append(None if i == outer else run(pipe, name))
            seen.append(run(_sibling(base, SD), SD))

        together = _run(pipes[outer], names[outer], **_once(nested, 1))
        assert torch.equal(together, alone[outer])
        for i, got in enumerate(seen[:3]):
            assert i == outer or torch.equal(got, alone[i]), names[i]
        assert torch.equal(seen[3], stock)
    for pipe in pipes:
        pag_fast.unpatch(pipe)
    assert "_compiled_call_impl" not in vars(base.unet)


def test_a_guider_and_a_patched_pipeline_on_one_unet():
    arming = pytest.importorskip("pag_fast.guiders.arming", exc_type=ImportError)

    pipe = _patched(build(SD))
    alone, seen = _run(pipe), []

    class Guider:
        def run(self, below, args, kwargs):
            seen.append(len(args))
            return below(*args, **kwargs)

    guider = Guider()
    x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 12)

    def other(guider=guider):
        armed = arming.Armed(pipe.unet, guider.run)
        with torch.no_grad():
            seen.append(pipe.unet(x, 7, encoder_hidden_states=text).sample)
        armed.disarm()

    other()
    together = _run(pipe, **_once(other, 1))
    assert torch.equal(together, alone)
    assert torch.equal(seen[1], seen[3])
    # one whose loop raised before its forward came: it does not take ours for his
    arming.Armed(pipe.unet, guider.run)
    del guider, other
    gc.collect()
    assert torch.equal(_run(pipe), alone)


# ---- ControlNets ----


@pytest.mark.parametrize("shared", ["one", "multi", "one of two"])
def test_shared_controlnets(shared):
    nets = 1 if shared == "one" else 2
    kwargs = {} if shared == "one" else {"controlnets": nets}
    base = build("StableDiffusionControlNetPAGPipeline", **kwargs)
    parts = dict(base.components)

    def make(net, seed):
        torch.manual_seed(seed)
        unet = tiny.randomise(tiny.unet(**SHALLOW[SD]))
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **{
                **parts,
                "unet": unet,
                "controlnet": net,
                "scheduler": copy.deepcopy(base.scheduler),
            },
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    first = make(base.controlnet, 1)
    second = make(base.controlnet.nets[0] if shared == "one of two" else base.controlnet, 2)
    third = make(base.controlnet, 3)
    stock = _run(third, CONTROL)
    alone = []
    for pipe in (first, second):
        _patched(pipe)
        alone.append(_run(pipe, CONTROL))
        pag_fast.unpatch(pipe)
    for pipe in (first, second):
        _patched(pipe)
    seen = []
    nested = _once(lambda: seen.extend([_run(second, CONTROL), _run(third, CONTROL)]), 1)
    assert torch.equal(_run(first, CONTROL, **nested), alone[0])
    assert torch.equal(seen[0], alone[1])
    assert torch.equal(seen[1], stock)
    # stock enters the whole and then its nets: whoever takes them in another order waits for ever
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(lambda p=p: [_run(p, CONTROL) for _ in range(3)])
            for p in (first, second, third)
        ]
        for one, expected in zip(runs, [*alone, stock], strict=True):
            assert all(relative(x, expected) < 1e-5 for x in one.result(120))
    for pipe in (first, second):
        pag_fast.unpatch(pipe)
    for module in base.controlnet.modules():
        assert "_compiled_call_impl" not in vars(module)


def _alone(entry):
    with entry.alone("a patched pipeline"):
        return entry.run(leases.InstancePatch.nothing, (), {})


def test_a_multicontrolnet_entered_from_both_sides():
    """A stock forward in the whole, a patched one in front of it: neither waits for the other."""
    base = build("StableDiffusionControlNetPAGPipeline", controlnets=2)
    multi = base.controlnet
    entry, nets = Entry(multi), [Entry(net) for net in multi.nets]
    entry.inner = nets
    inside, go, ran = threading.Event(), threading.Event(), []

    def stock():
        with entry.lease.share():
            inside.set()
            go.wait(10)
            for net in nets:
                with net.lease.share():
                    ran.append("stock")

    entry._own = lambda: ran.append("patched")
    for net in nets:
        net._own = lambda: None
    with ThreadPoolExecutor(2) as pool:
        a = pool.submit(stock)
        inside.wait(10)
        b = pool.submit(_alone, entry)
        # it has got as far as it can without the other
        threading.Event().wait(0.3)
        go.set()
        a.result(10)
        b.result(10)
    assert ran == ["stock", "stock", "patched"]


# ---- waiting in vain ----


def test_waiting_in_vain_names_both_and_leaves_everything_usable(monkeypatch, snapshot):
    (first, second), alone = _two()
    monkeypatch.setattr(leases, "PATIENCE", 0.3)
    before, seen = snapshot(first), []

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            with pytest.raises(ValueError) as caught:
                _in_thread(lambda: _run(second, PAG))
            seen[0] = str(caught.value)

    inner = first.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    handle = inner.register_forward_hook(hook)
    together = _run(first)
    handle.remove()
    assert f"{PAG} (patched) has waited" in seen[0]
    assert f"{SD} (patched) is running" in seen[0]
    assert relative(together, alone[0]) < 1e-5
    assert snapshot(first) == before
    assert torch.equal(_run(first), alone[0])
    assert torch.equal(_run(second, PAG), alone[1])


@pytest.mark.parametrize("waits", ["stock", "patched"])
def test_waiting_for_or_as_a_stock_pipeline(monkeypatch, waits):
    """Whoever is stock is named as well."""
    pipe = build(SD)
    sibling = _sibling(pipe, "StableDiffusionImg2ImgPipeline")
    picture = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0}
    _patched(pipe)
    alone = _run(pipe)
    monkeypatch.setattr(leases, "PATIENCE", 0.3)

    def stock():
        kwargs = tiny_hosts.call_kwargs("StableDiffusionImg2ImgPipeline", sibling, steps=STEPS)
        return sibling(**{**kwargs, **picture}).images

    outer, inner = (lambda: _run(pipe), stock) if waits == "stock" else (stock, lambda: _run(pipe))
    seen = []

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            with pytest.raises(ValueError) as caught:
                _in_thread(inner)
            seen[0] = str(caught.value)

    handle = pipe.unet.mid_block.attentions[0].register_forward_hook(hook)
    outer()
    handle.remove()
    assert "StableDiffusionImg2ImgPipeline" in seen[0]
    assert f"{SD} (patched)" in seen[0]
    assert torch.equal(_run(pipe), alone)


def test_a_second_call_of_one_pipeline_is_refused():
    pipe, seen = _patched(build(SD)), []
    alone = _run(pipe)

    def again():
        for run in (lambda: _run(pipe), lambda: _in_thread(lambda: _run(pipe))):
            with pytest.raises(ValueError, match="already running"):
                run()
        seen.append(1)

    assert torch.equal(_run(pipe, **_once(again)), alone)
    assert seen
    # at the same moment: one runs, the other is refused or runs after it
    start = threading.Barrier(4)

    def run():
        start.wait(60)
        try:
            return _run(pipe)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        got = [x.result(60) for x in [pool.submit(run) for _ in range(4)]]
    ran = [x for x in got if not isinstance(x, str)]
    assert ran
    assert all(torch.equal(x, alone) for x in ran)
    assert all("already running" in x for x in got if isinstance(x, str))


@pytest.fixture
def stance(request):
    """A compiler as it is, or given up: then a wrapper calls the model that it has wrapped."""
    torch._dynamo.reset()
    with torch.compiler.set_stance(request.param):
        yield


@pytest.mark.parametrize(
    ("stance", "wrapped_first"),
    [("default", True), ("force_eager", True), ("force_eager", False)],
    indirect=["stance"],
)
def test_a_model_and_its_compiled_wrapper_have_one_user(wrapped_first, stance, monkeypatch):
    """``torch.compile(unet)`` is another module, and runs the same ones."""
    raw, layers = least(SD)
    wrapped = _sibling(raw, unet=torch.compile(raw.unet, backend="eager"))
    pipes, alone = (raw, wrapped), []
    for pipe in pipes:
        pag_fast.patch(pipe, layers, pag_scale=2.0)
        alone.append(_run(pipe))
        pag_fast.unpatch(pipe)
    assert relative(*alone) < 1e-5
    for pipe in reversed(pipes) if wrapped_first else pipes:
        pag_fast.patch(pipe, layers, pag_scale=2.0)
    assert Entry.of(raw.unet) is not Entry.of(wrapped.unet)
    assert Entry.of(raw.unet).lease is Entry.of(wrapped.unet).lease
    for pipe, other in (pipes, pipes[::-1]):
        seen = []
        nested = _once(lambda seen=seen, other=other: seen.append(_run(other)), 1)
        assert relative(_run(pipe, **nested), alone[0]) < 1e-5
        assert relative(seen[0], alone[0]) < 1e-5
    start = threading.Barrier(2)

    def run(pipe):
        start.wait(60)
        return [_run(pipe) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(run, pipe) for pipe in pipes]:
            assert all(relative(x, alone[0]) < 1e-5 for x in found.result(120))
    # forwards of the one wait for those of the other
    with Entry.of(wrapped.unet).alone("somebody"), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(leases, "PATIENCE", 0.2)
        waits = pool.submit(_run, raw)
        with pytest.raises(ValueError, match="for a model that somebody is running"):
            waits.result(60)
    for pipe in pipes:
        pag_fast.unpatch(pipe)
    assert not relative(_run(raw), alone[0]) < 1e-5


@pytest.mark.parametrize("name", [SD, PAG])
def test_a_wrapped_model_has_its_methods(name):
    """``torch.compile(pipe.unet)`` has none of its own; PAG pipelines set processors in a call."""
    pipe = build(name)
    expected = pipe.unet.attn_processors
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    _patched(pipe, name)
    pipe.unet.set_attn_processor(pipe.unet.attn_processors)
    assert pipe.unet.attn_processors == expected
    pag_fast.unpatch(pipe)
    assert "set_attn_processor" not in vars(pipe.unet)


# ---- a stock PAG pipeline has its processors on the model for all of its call ----


class _Beside:
    """A stock PAG sibling that runs in another thread: its call begins, waits, and ends.

    Its ``layers`` run its processors from begin to end.
    """

    def __init__(self, pipe, layers):
        self.pipe = _sibling(pipe, PAG)
        self.pipe.set_pag_applied_layers(layers)
        self.alone = _run(self.pipe, PAG)
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def begin(self, wait=True):
        waits = _once(lambda: (self._inside.set(), self._go_on.wait(60)))
        self._result = self._pool.submit(_run, self.pipe, PAG, **waits)
        assert not wait or self._inside.wait(60)

    def end(self):
        self._go_on.set()
        assert torch.equal(self._result.result(60), self.alone)


def _left_behind(pipe):
    kinds = {type(x).__name__ for x in pipe.unet.attn_processors.values()}
    return {kind for kind in kinds if "PAG" in kind}


@pytest.mark.parametrize("name", [SD, PAG])
def test_a_stock_pag_pipeline_beside_ours_on_the_same_layers(name):
    pipe = build(name)
    beside = _Beside(pipe, ["mid"])
    _patched(pipe, name)
    alone = _run(pipe, name)
    # it begins first, and ends in the middle of ours
    beside.begin()
    assert torch.equal(_run(pipe, name, **_once(beside.end, 1)), alone)
    assert not _left_behind(pipe)
    # it begins in the middle of ours, and ends last
    beside = _Beside(pipe, ["mid"])
    assert torch.equal(_run(pipe, name, **_once(beside.begin, 1)), alone)
    beside.end()
    assert not _left_behind(pipe)
    assert torch.equal(_run(pipe, name), alone)


@pytest.mark.parametrize("layers", [["down_blocks.0"], ["up_blocks.0"]], ids=str)
@pytest.mark.parametrize("name", [SD, PAG])
def test_a_stock_pag_pipeline_beside_ours_on_other_layers_is_refused(name, layers):
    """Only that pipeline knows what it has put its processors in the place of."""
    pipe = build(name)
    beside = _Beside(pipe, layers)
    _patched(pipe, name)
    alone = _run(pipe, name)
    beside.begin()
    with pytest.raises(ValueError, match="which a PAG pipeline that shares this model has put"):
        _run(pipe, name)
    beside.end()
    assert not _left_behind(pipe)
    assert torch.equal(_run(pipe, name), alone)


@pytest.mark.parametrize("layers", [["mid"], ["up_blocks.0"]], ids=str)
def test_a_stock_pag_pipeline_that_begins_in_the_middle_of_our_forward(layers):
    pipe = build(SD)
    beside = _Beside(pipe, layers)
    _patched(pipe)
    alone, begun = _run(pipe), []

    def begin(*_):
        if not begun and pipe._pag_fast.session is not None:
            begun.append(1)
            beside.begin(wait=False)
            while not _left_behind(pipe):
                pass

    handle = pipe.unet.conv_in.register_forward_hook(observing(begin))
    with pytest.raises(ValueError, match="PAG pipeline that shares this model has"):
        _run(pipe)
    beside.end()
    handle.remove()
    assert begun and not _left_behind(pipe)
    assert torch.equal(_run(pipe), alone)


def test_processors_that_a_pag_pipeline_has_left_are_told():
    """Stock leaves them where an error ends its call."""
    pipe = build(SD)
    sibling = _sibling(pipe, PAG)
    sibling.set_pag_applied_layers(["up_blocks.0"])
    _patched(pipe)
    alone = _run(pipe)
    with pytest.raises(ZeroDivisionError):
        _run(sibling, PAG, **_once(lambda: 1 / 0))
    with pytest.raises(ValueError, match="or an error has ended it"):
        _run(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(_run(pipe), alone)
