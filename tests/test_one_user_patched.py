"""Patched pipelines that share a model or ControlNets take turns, each with its own picture."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from shallow import SHALLOW, build
from users import FLUX, PAG, SD, STEPS, patched_on, run_call, run_once, sibling_of, two_patched

import pag_fast
from pag_fast.runtime.access import lease as leases
from pag_fast.runtime.access.entry import Entry

CONTROL = "StableDiffusionControlNetPipeline"


def _model(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


# ---- two patched pipelines on one model ----


PAIRS = pytest.mark.parametrize("names", [(SD, SD), (SD, PAG), (PAG, SD), (FLUX, FLUX)], ids=str)


@PAIRS
def test_two_patched_pipelines_in_turns_and_nested(names, snapshot):
    (first, second), alone = two_patched(names)
    for _ in range(2):
        assert relative(run_call(first, names[0]), alone[0]) < 1e-5
        assert relative(run_call(second, names[1]), alone[1]) < 1e-5
    seen = []
    nested = run_once(lambda: seen.append(run_call(second, names[1])), 1)
    assert relative(run_call(first, names[0], **nested), alone[0]) < 1e-5
    assert relative(seen[0], alone[1]) < 1e-5
    # one goes, the other stays
    before = snapshot(first)
    pag_fast.unpatch(second)
    assert relative(run_call(first, names[0]), alone[0]) < 1e-5
    assert snapshot(first) == before
    pag_fast.unpatch(first)
    assert "_compiled_call_impl" not in vars(_model(first))
    assert not torch.equal(run_call(first, names[0]), alone[0])


@PAIRS
def test_two_patched_pipelines_in_two_threads(names):
    pipes, alone = two_patched(names)
    start = threading.Barrier(2)

    def run(pipe, name):
        start.wait(60)
        return [run_call(pipe, name) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, *pair) for pair in zip(pipes, names, strict=True)]
        for one, expected in zip(runs, alone, strict=True):
            assert all(relative(x, expected) < 1e-5 for x in one.result(120))


def test_a_patched_pipeline_that_nobody_has_any_more_is_let_go():
    (first, second), alone = two_patched()
    model = first.unet
    entry = vars(model)["_compiled_call_impl"]
    assert len(entry.claims) == 2
    del first
    gc.collect()
    assert len(entry.claims) == 1
    assert torch.equal(run_call(second, PAG), alone[1])
    del second
    gc.collect()
    assert "_compiled_call_impl" not in vars(model)


def test_four_kinds_of_users_of_one_unet():
    """PAG, PAG injected, SAG and stock: in turns, nested in one another, and none is left."""
    names = [PAG, SD, "StableDiffusionSAGPipeline"]
    base = tiny.build(PAG)
    pipes = [sibling_of(base, name) for name in names]

    def run(pipe, name):
        extra = {"sag_scale": 0.7} if "SAG" in name else {}
        if "SAG" in name:
            kwargs = tiny_hosts.call_kwargs(SD, pipe, steps=STEPS)
            return pipe(**kwargs, **extra).images
        return run_call(pipe, name)

    stock = run(sibling_of(base, SD), SD)
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
            seen.append(run(sibling_of(base, SD), SD))

        together = run_call(pipes[outer], names[outer], **run_once(nested, 1))
        assert torch.equal(together, alone[outer])
        for i, got in enumerate(seen[:3]):
            assert i == outer or torch.equal(got, alone[i]), names[i]
        assert torch.equal(seen[3], stock)
    for pipe in pipes:
        pag_fast.unpatch(pipe)
    assert "_compiled_call_impl" not in vars(base.unet)


def test_a_guider_and_a_patched_pipeline_on_one_unet():
    arming = pytest.importorskip("pag_fast.guiders.arming", exc_type=ImportError)

    pipe = patched_on(build(SD))
    alone, seen = run_call(pipe), []

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
    together = run_call(pipe, **run_once(other, 1))
    assert torch.equal(together, alone)
    assert torch.equal(seen[1], seen[3])
    # one whose loop raised before its forward came: it does not take ours for his
    arming.Armed(pipe.unet, guider.run)
    del guider, other
    gc.collect()
    assert torch.equal(run_call(pipe), alone)


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
    stock = run_call(third, CONTROL)
    alone = []
    for pipe in (first, second):
        patched_on(pipe)
        alone.append(run_call(pipe, CONTROL))
        pag_fast.unpatch(pipe)
    for pipe in (first, second):
        patched_on(pipe)
    seen = []
    nested = run_once(lambda: seen.extend([run_call(second, CONTROL), run_call(third, CONTROL)]), 1)
    assert torch.equal(run_call(first, CONTROL, **nested), alone[0])
    assert torch.equal(seen[0], alone[1])
    assert torch.equal(seen[1], stock)
    # stock enters the whole and then its nets: whoever takes them in another order waits for ever
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(lambda p=p: [run_call(p, CONTROL) for _ in range(3)])
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
