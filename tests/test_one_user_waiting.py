"""Who waits for a model in vain is told who has it, and a compiled wrapper is no other model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_hosts
import torch
from numerics import observing, relative
from shallow import build, least
from users import PAG, SD, STEPS, in_thread, patched_on, run_call, run_once, sibling_of, two_patched

import pag_fast
from pag_fast.runtime.access import lease as leases
from pag_fast.runtime.access.entry import Entry


def test_waiting_in_vain_names_both_and_leaves_everything_usable(monkeypatch, snapshot):
    (first, second), alone = two_patched()
    monkeypatch.setattr(leases, "PATIENCE", 0.3)
    before, seen = snapshot(first), []

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            with pytest.raises(ValueError) as caught:
                in_thread(lambda: run_call(second, PAG))
            seen[0] = str(caught.value)

    inner = first.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    handle = inner.register_forward_hook(hook)
    together = run_call(first)
    handle.remove()
    assert f"{PAG} (patched) has waited" in seen[0]
    assert f"{SD} (patched) is running" in seen[0]
    assert relative(together, alone[0]) < 1e-5
    assert snapshot(first) == before
    assert torch.equal(run_call(first), alone[0])
    assert torch.equal(run_call(second, PAG), alone[1])


@pytest.mark.parametrize("waits", ["stock", "patched"])
def test_waiting_for_or_as_a_stock_pipeline(monkeypatch, waits):
    """Whoever is stock is named as well."""
    pipe = build(SD)
    sibling = sibling_of(pipe, "StableDiffusionImg2ImgPipeline")
    picture = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0}
    patched_on(pipe)
    alone = run_call(pipe)
    monkeypatch.setattr(leases, "PATIENCE", 0.3)

    def stock():
        kwargs = tiny_hosts.call_kwargs("StableDiffusionImg2ImgPipeline", sibling, steps=STEPS)
        return sibling(**{**kwargs, **picture}).images

    outer, inner = (
        (lambda: run_call(pipe), stock) if waits == "stock" else (stock, lambda: run_call(pipe))
    )
    seen = []

    @observing
    def hook(*_):
        if not seen:
            seen.append(None)
            with pytest.raises(ValueError) as caught:
                in_thread(inner)
            seen[0] = str(caught.value)

    handle = pipe.unet.mid_block.attentions[0].register_forward_hook(hook)
    outer()
    handle.remove()
    assert "StableDiffusionImg2ImgPipeline" in seen[0]
    assert f"{SD} (patched)" in seen[0]
    assert torch.equal(run_call(pipe), alone)


def test_a_second_call_of_one_pipeline_is_refused():
    pipe, seen = patched_on(build(SD)), []
    alone = run_call(pipe)

    def again():
        for run in (lambda: run_call(pipe), lambda: in_thread(lambda: run_call(pipe))):
            with pytest.raises(ValueError, match="already running"):
                run()
        seen.append(1)

    assert torch.equal(run_call(pipe, **run_once(again)), alone)
    assert seen
    # at the same moment: one runs, the other is refused or runs after it
    start = threading.Barrier(4)

    def run():
        start.wait(60)
        try:
            return run_call(pipe)
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
    wrapped = sibling_of(raw, unet=torch.compile(raw.unet, backend="eager"))
    pipes, alone = (raw, wrapped), []
    for pipe in pipes:
        pag_fast.patch(pipe, layers, pag_scale=2.0)
        alone.append(run_call(pipe))
        pag_fast.unpatch(pipe)
    assert relative(*alone) < 1e-5
    for pipe in reversed(pipes) if wrapped_first else pipes:
        pag_fast.patch(pipe, layers, pag_scale=2.0)
    assert Entry.of(raw.unet) is not Entry.of(wrapped.unet)
    assert Entry.of(raw.unet).lease is Entry.of(wrapped.unet).lease
    for pipe, other in (pipes, pipes[::-1]):
        seen = []
        nested = run_once(lambda seen=seen, other=other: seen.append(run_call(other)), 1)
        assert relative(run_call(pipe, **nested), alone[0]) < 1e-5
        assert relative(seen[0], alone[0]) < 1e-5
    start = threading.Barrier(2)

    def run(pipe):
        start.wait(60)
        return [run_call(pipe) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(run, pipe) for pipe in pipes]:
            assert all(relative(x, alone[0]) < 1e-5 for x in found.result(120))
    # forwards of the one wait for those of the other
    with Entry.of(wrapped.unet).alone("somebody"), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(leases, "PATIENCE", 0.2)
        waits = pool.submit(run_call, raw)
        with pytest.raises(ValueError, match="for a model that somebody is running"):
            waits.result(60)
    for pipe in pipes:
        pag_fast.unpatch(pipe)
    assert not relative(run_call(raw), alone[0]) < 1e-5


@pytest.mark.parametrize("name", [SD, PAG])
def test_a_wrapped_model_has_its_methods(name):
    """``torch.compile(pipe.unet)`` has none of its own; PAG pipelines set processors in a call."""
    pipe = build(name)
    expected = pipe.unet.attn_processors
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    patched_on(pipe, name)
    pipe.unet.set_attn_processor(pipe.unet.attn_processors)
    assert pipe.unet.attn_processors == expected
    pag_fast.unpatch(pipe)
    assert "set_attn_processor" not in vars(pipe.unet)
