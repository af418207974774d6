"""A model has one user at a time, and everybody else gets it as it is."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import observing, relative
from shallow import build
from users import FLUX, PAG, SD, STEPS, in_thread, patched_on, run_call, run_once, sibling_of

# ---- a stock pipeline on the same model ----


@pytest.mark.parametrize("name", [SD, FLUX, PAG])
@pytest.mark.parametrize("thread", [False, True], ids=["callback", "thread"])
def test_a_stock_sibling_in_a_callback(name, thread):
    pipe = build(name)
    sibling = sibling_of(pipe, name)
    stock, seen = run_call(sibling, name), []
    patched_on(pipe, name)
    alone = run_call(pipe, name)
    assert relative(alone, stock) > 1e-3 or name == PAG

    def other():
        run = functools.partial(run_call, sibling, name)
        seen.append(in_thread(run) if thread else run())

    together = run_call(pipe, name, **run_once(other, 1))
    assert torch.equal(seen[0], stock)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", [SD, FLUX])
def test_stock_siblings_in_threads_all_the_while(name):
    pipe = build(name)
    siblings = [sibling_of(pipe, name) for _ in range(3)]
    stock = run_call(siblings[0], name)
    patched_on(pipe, name)
    alone = run_call(pipe, name)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(run_call, s, name) for s in siblings]
        ours = pool.submit(lambda: [run_call(pipe, name) for _ in range(3)])
        assert all(torch.equal(x.result(120), stock) for x in others)
        assert all(torch.equal(x, alone) for x in ours.result(120))


def test_forwards_of_a_thread_pool_do_not_starve_a_call():
    """Forwards that overlap without end once kept the model from ever being free."""
    pipe = patched_on(build(SD))
    alone, stop = run_call(pipe), threading.Event()
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
            ours = pool.submit(run_call, pipe).result(60)
        finally:
            stop.set()
        assert all(other.result(60) for other in others)
    assert torch.equal(ours, alone)


@pytest.mark.parametrize("name", [SD, PAG])
def test_a_stock_sibling_inside_a_hook_of_our_forward(name):
    """In the middle of our forward the model is stock for everybody else."""
    pipe = build(name)
    sibling, seen = sibling_of(pipe, name), []
    stock = run_call(sibling, name, steps=1)

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            seen[0] = run_call(sibling, name, steps=1)

    patched_on(pipe, name)
    alone = run_call(pipe, name)
    inner = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    for module in (inner, pipe.unet):
        seen.clear()
        handle = module.register_forward_hook(hook)
        together = run_call(pipe, name)
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
    patched_on(pipe, name)
    alone = run_call(pipe, name)

    @observing
    def hook(*_):
        if not inside:
            inside.append(1)
            seen.append(forward())
            inside.clear()

    inner = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    handle = inner.register_forward_hook(hook)
    together = run_call(pipe, name)
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
    patched_on(pipe, name)
    alone = run_call(pipe, name)
    callback = _callbacks(lambda: seen.append(forward()))[kind]
    together = run_call(pipe, name, callback_on_step_end=callback)
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
    patched_on(pipe)
    assert torch.equal(loop(), stock)
    run_call(pipe)
    assert torch.equal(loop(), stock)


# ---- a stock PAG pipeline has its processors on the model for all of its call ----


class _Beside:
    """A stock PAG sibling that runs in another thread: its call begins, waits, and ends.

    Its ``layers`` run its processors from begin to end.
    """

    def __init__(self, pipe, layers):
        self.pipe = sibling_of(pipe, PAG)
        self.pipe.set_pag_applied_layers(layers)
        self.alone = run_call(self.pipe, PAG)
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def begin(self, wait=True):
        waits = run_once(lambda: (self._inside.set(), self._go_on.wait(60)))
        self._result = self._pool.submit(run_call, self.pipe, PAG, **waits)
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
    patched_on(pipe, name)
    alone = run_call(pipe, name)
    # it begins first, and ends in the middle of ours
    beside.begin()
    assert torch.equal(run_call(pipe, name, **run_once(beside.end, 1)), alone)
    assert not _left_behind(pipe)
    # it begins in the middle of ours, and ends last
    beside = _Beside(pipe, ["mid"])
    assert torch.equal(run_call(pipe, name, **run_once(beside.begin, 1)), alone)
    beside.end()
    assert not _left_behind(pipe)
    assert torch.equal(run_call(pipe, name), alone)


@pytest.mark.parametrize("layers", [["down_blocks.0"], ["up_blocks.0"]], ids=str)
@pytest.mark.parametrize("name", [SD, PAG])
def test_a_stock_pag_pipeline_beside_ours_on_other_layers_is_refused(name, layers):
    """Only that pipeline knows what it has put its processors in the place of."""
    pipe = build(name)
    beside = _Beside(pipe, layers)
    patched_on(pipe, name)
    alone = run_call(pipe, name)
    beside.begin()
    with pytest.raises(ValueError, match="which a PAG pipeline that shares this model has put"):
        run_call(pipe, name)
    beside.end()
    assert not _left_behind(pipe)
    assert torch.equal(run_call(pipe, name), alone)


@pytest.mark.parametrize("layers", [["mid"], ["up_blocks.0"]], ids=str)
def test_a_stock_pag_pipeline_that_begins_in_the_middle_of_our_forward(layers):
    pipe = build(SD)
    beside = _Beside(pipe, layers)
    patched_on(pipe)
    alone, begun = run_call(pipe), []

    def begin(*_):
        if not begun and pipe._pag_fast.session is not None:
            begun.append(1)
            beside.begin(wait=False)
            while not _left_behind(pipe):
                pass

    handle = pipe.unet.conv_in.register_forward_hook(observing(begin))
    with pytest.raises(ValueError, match="PAG pipeline that shares this model has"):
        run_call(pipe)
    beside.end()
    handle.remove()
    assert begun and not _left_behind(pipe)
    assert torch.equal(run_call(pipe), alone)


def test_processors_that_a_pag_pipeline_has_left_are_told():
    """Stock leaves them where an error ends its call."""
    pipe = build(SD)
    sibling = sibling_of(pipe, PAG)
    sibling.set_pag_applied_layers(["up_blocks.0"])
    patched_on(pipe)
    alone = run_call(pipe)
    with pytest.raises(ZeroDivisionError):
        run_call(sibling, PAG, **run_once(lambda: 1 / 0))
    with pytest.raises(ValueError, match="or an error has ended it"):
        run_call(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run_call(pipe), alone)
