"""A model has one user at a time, and everybody else gets it as it is."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast
from pag_fast.runtime.access import lease as leases
from pag_fast.runtime.access.entry import ProcessorSetter
from pag_fast.runtime.access.instance_patch import InstancePatch

PAG, HOST = "StableDiffusionXLPAGPipeline", "StableDiffusionXLPipeline"
SD = "StableDiffusionPAGPipeline"


def _sibling(pipe):
    """A stock pipeline that shares the models."""
    components = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    found = diffusers.StableDiffusionXLPipeline(**components, add_watermarker=False)
    found.set_progress_bar_config(disable=True)
    return found


def _stock(pipe, **more):
    return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe, steps=3, **more))


def _pag(pipe, **more):
    return tiny.latents(pipe, tiny.call_kwargs(PAG, pipe, steps=3, **more))


@pytest.fixture
def pair():
    """A patched pipeline and a stock one on the same UNet, and what each makes alone."""
    patched = tiny.build(PAG)
    stock = _sibling(patched)
    alone = _stock(stock)
    pag_fast.patch(patched, "mid")
    expected = _pag(patched)
    assert relative(_stock(stock), alone) < 1e-6
    return patched, stock, expected, alone


def test_a_sibling_in_a_callback(pair):
    patched, stock, expected, alone = pair
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(_stock(stock))
        return tensors

    assert relative(_pag(patched, callback_on_step_end=callback), expected) < 1e-6
    assert len(seen) == 3 and all(relative(x, alone) < 1e-6 for x in seen)


def test_a_sibling_inside_of_a_forward(pair):
    """What is on the model is off while a hook of somebody's runs it for himself."""
    patched, stock, expected, alone = pair
    seen = []

    @pag_fast.runtime.compatibility.row_wise
    def hook(*_):
        if not seen:
            seen.append(None)
            seen.append(_stock(stock))

    handle = patched.unet.mid_block.resnets[0].register_forward_hook(hook)
    got = _pag(patched)
    handle.remove()
    assert relative(seen[1], alone) < 1e-6
    assert relative(got, expected) < 1e-6


def test_two_threads_on_one_model(pair):
    patched, stock, expected, alone = pair
    results: dict[str, list[float]] = {"patched": [], "stock": []}

    def run(name, pipe, make, truth):
        for _ in range(4):
            results[name].append(relative(make(pipe), truth))

    threads = [
        threading.Thread(target=run, args=("patched", patched, _pag, expected)),
        threading.Thread(target=run, args=("stock", stock, _stock, alone)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(len(found) == 4 and max(found) < 1e-6 for found in results.values()), results


def _in_threads(*pairs, rounds=4):
    """The largest difference of each pipeline's pictures from its own, all running at once."""
    found = [[] for _ in pairs]

    def run(index, make, truth):
        try:
            for _ in range(rounds):
                found[index].append(relative(make(), truth))
        except Exception as error:
            found[index].append(error)

    threads = [
        threading.Thread(target=run, args=(i, make, truth)) for i, (make, truth) in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    errors = [x for each in found for x in each if isinstance(x, Exception)]
    assert not errors, errors
    return [max(each) for each in found]


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline"])
def test_two_patched_pipelines_with_passes_apart_in_two_threads(name):
    layers = tiny_hosts.HOSTS[name].layers["middle"]
    first = tiny_hosts.build(name)
    second = type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    pag_fast.patch(first, layers, pag_scale=3.0)
    pag_fast.patch(second, layers, pag_scale=2.0)

    def make(pipe):
        return lambda: tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, steps=3))

    pairs = [(make(pipe), make(pipe)()) for pipe in (first, second)]
    assert relative(pairs[0][1], pairs[1][1]) > 1e-4
    assert max(_in_threads(*pairs)) < 1e-6


def test_two_patched_pag_pipelines_in_two_threads():
    """They read the model's processors when a call begins, and set them when it ends."""
    first = tiny.build(PAG)
    second = type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    processors = dict(first.unet.attn_processors)

    def make(pipe):
        kwargs = tiny.call_kwargs(PAG, pipe, steps=3)
        kwargs.update(output_type="latent")

        def run():
            own = {**kwargs}
            if "generator" in own:
                own["generator"] = torch.Generator().manual_seed(0)
            return pipe(**own).images

        return run

    pag_fast.patch(first, "mid", strict=True)
    pag_fast.patch(second, "up", strict=True)
    pairs = [(run, run()) for run in map(make, (first, second))]
    assert relative(pairs[0][1], pairs[1][1]) > 1e-4
    assert max(_in_threads(*pairs, rounds=8)) < 1e-6
    pag_fast.unpatch(first)
    pag_fast.unpatch(second)
    assert first.unet.attn_processors == processors
    assert "set_attn_processor" not in vars(first.unet)


def test_two_patched_pipelines_on_one_model(pair):
    first, stock, expected, alone = pair
    second = pag_fast.patch(_sibling(first), "up", pag_scale=2.0)
    other = _stock(second)
    assert relative(other, alone) > 1e-4
    nested = []

    def callback(pipe, step, timestep, tensors):
        nested.append(_stock(second))
        return tensors

    assert relative(_pag(first, callback_on_step_end=callback), expected) < 1e-6
    assert all(relative(x, other) < 1e-6 for x in nested)
    pag_fast.unpatch(first)
    assert relative(_stock(second), other) < 1e-6
    pag_fast.unpatch(second)
    assert relative(_stock(second), alone) < 1e-6
    assert "_compiled_call_impl" not in vars(first.unet)


def test_a_patched_pipeline_that_is_gone(pair):
    patched, stock, expected, alone = pair
    another = pag_fast.patch(_sibling(patched), "up")
    _stock(another)
    pag_fast.unpatch(patched)
    assert "_compiled_call_impl" in vars(stock.unet)
    del another
    gc.collect()
    assert "_compiled_call_impl" not in vars(stock.unet)
    assert relative(_stock(stock), alone) < 1e-6


def test_a_callback_that_runs_the_model_itself(pair):
    patched, _, expected, _ = pair
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 1,
        "encoder_hidden_states": torch.randn(1, 6, patched.unet.config.cross_attention_dim),
    }
    added = patched.unet.config.projection_class_embeddings_input_dim
    width = patched.unet.config.addition_time_embed_dim
    inputs["added_cond_kwargs"] = {
        "text_embeds": torch.randn(1, added - 6 * width),
        "time_ids": torch.ones(1, 6),
    }
    seen = []

    def run():
        with torch.no_grad():
            return patched.unet(**inputs).sample

    alone = run()

    def callback(pipe, step, timestep, tensors):
        seen.append(run())
        return tensors

    assert relative(_pag(patched, callback_on_step_end=callback), expected) < 1e-6
    assert all(relative(x, alone) < 1e-6 for x in seen)


def test_waiting_in_vain_names_both(pair, monkeypatch):
    patched, stock, expected, alone = pair
    monkeypatch.setattr(leases, "PATIENCE", 0.5)
    lease = vars(patched.unet)["_compiled_call_impl"].lease
    begun, over = threading.Event(), threading.Event()

    def hold():
        with lease.hold("Somebody's pipeline", InstancePatch.nothing):
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(10)
    try:
        with pytest.raises(ValueError, match=r"patched.*Somebody's pipeline"):
            patched(**tiny.call_kwargs(PAG, patched, steps=3))
    finally:
        over.set()
        thread.join()
    assert relative(_pag(patched), expected) < 1e-6
    assert relative(_stock(stock), alone) < 1e-6


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_patched_pipelines_travel(way):
    pipe = tiny.build(SD)
    users = list(pipe.pag_applied_layers)
    stock = tiny.latents(pipe, tiny.call_kwargs(SD, pipe))
    pag_fast.patch(pipe, "up", strict=True)
    expected = tiny.latents(pipe, tiny.call_kwargs(SD, pipe))
    there = way(pipe)
    assert there.unet is not pipe.unet
    assert there._pag_fast.config == pipe._pag_fast.config
    assert relative(tiny.latents(there, tiny.call_kwargs(SD, there)), expected) < 1e-6
    pag_fast.unpatch(there)
    assert list(there.pag_applied_layers) == users
    assert relative(tiny.latents(there, tiny.call_kwargs(SD, there)), stock) < 1e-6
    assert relative(tiny.latents(pipe, tiny.call_kwargs(SD, pipe)), expected) < 1e-6


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("what", ["pipe", "unet", "unet of a copy"])
def test_a_copy_sets_processors_as_what_it_was_copied_from(way, what):
    """Setting processors waits for the copy's forwards, too, and ``unpatch`` leaves nothing."""
    pipe = tiny.build(SD)
    stock = tiny.latents(pipe, tiny.call_kwargs(SD, pipe))
    pag_fast.patch(pipe)
    there = way(pipe) if what == "pipe" else tiny.build(SD)
    if what != "pipe":
        there.unet = way(pipe.unet)
        if what == "unet of a copy":
            there.unet = way(there.unet)
        pag_fast.patch(there)
    assert relative(tiny.latents(there, tiny.call_kwargs(SD, there)), stock) < 1e-5
    made = vars(there.unet)["set_attn_processor"]
    assert isinstance(made, ProcessorSetter) and made is not vars(pipe.unet)["set_attn_processor"]
    pag_fast.unpatch(there)
    assert "set_attn_processor" not in vars(there.unet)
    assert relative(tiny.latents(there, tiny.call_kwargs(SD, there)), stock) < 1e-6


def test_a_users_own_way_to_set_processors_stays():
    pipe = tiny.build(SD)
    own = pipe.unet.set_attn_processor

    def users(*args):
        return own(*args)

    pipe.unet.set_attn_processor = users
    with pag_fast.patched(pipe):
        assert vars(pipe.unet)["set_attn_processor"] is users
    assert vars(pipe.unet)["set_attn_processor"] is users
