"""A guider's model in other hands: threads, pipelines, other guiders, copies."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import tiny_hosts
import torch
from modular import ALWAYS, SLG_ALWAYS, STEPS, case, denoise, differences, snapshot
from numerics import relative

import pag_fast

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance
SD3 = "StableDiffusion3Pipeline"


def stock_forward(setup):
    with torch.no_grad():
        return setup(setup.model, setup.sample, {n: pair[0] for n, pair in setup.pairs.items()})


def pipeline_of(model):
    """A pipeline without PAG that has the guider's model."""
    pipe = tiny_hosts.build(SD3)
    pipe.register_modules(transformer=model)
    return pipe


def picture(pipe):
    return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(SD3, pipe))


def run_together(*works):
    """Each in a thread of its own; the first error is raised here."""
    errors, gate = [], threading.Barrier(len(works))

    def guarded(work):
        try:
            gate.wait(60)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


# ---- threads ----


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_stock_forwards_of_another_thread(name):
    setup = case(name)
    stock, expected = stock_forward(setup), denoise(setup, PAG(**ALWAYS))
    before, seen = snapshot(setup.model), []

    def guide():
        for _ in range(6):
            seen.append(max(differences(denoise(setup, PAG(**ALWAYS)), expected)))

    def look():
        while len(seen) < 6:
            assert torch.equal(stock_forward(setup), stock)

    run_together(guide, look)
    assert seen == [0] * 6
    assert snapshot(setup.model) == before


@pytest.mark.parametrize("second", [PAG(perturbed_guidance_layers=1, **ALWAYS), SLG(**SLG_ALWAYS)])
def test_two_guiders_of_two_threads(second):
    """Neither disarms the other's pass, or runs on what the other has put on."""
    setup, first = case("sd3"), PAG(perturbed_guidance_layers=3, **ALWAYS)
    expected = [denoise(setup, guider) for guider in (first, second)]
    before = snapshot(setup.model)

    def guide(index, guider):
        for _ in range(6):
            assert max(differences(denoise(setup, guider), expected[index])) == 0

    run_together(lambda: guide(0, first), lambda: guide(1, second))
    assert snapshot(setup.model) == before


def test_a_guider_of_another_thread_between_preparation_and_forward():
    """It arms and disarms the same denoiser, and the pass that was prepared here stays prepared."""
    setup, second = case("sd3"), SLG(**SLG_ALWAYS)
    expected = [denoise(setup, guider) for guider in (PAG(**ALWAYS), second)]

    def other():
        assert max(differences(denoise(setup, second), expected[1])) == 0

    result = denoise(setup, PAG(**ALWAYS), before_pass=lambda step, branch: run_together(other))
    assert max(differences(result, expected[0])) == 0


def test_an_error_in_one_thread_leaves_the_other_alone():
    setup, failing = case("sd3"), PAG(perturbed_guidance_layers=1, **ALWAYS)
    expected, before = denoise(setup, PAG(**ALWAYS)), snapshot(setup.model)

    class Broken(Exception):
        pass

    def run(**kwargs):
        raise Broken

    def fail():
        for _ in range(6):
            with pytest.raises(Broken):
                denoise(setup, failing, run=run)
            with pytest.raises(RuntimeError):  # in the middle of the model
                denoise(setup, failing, run=lambda **kwargs: setup.model(**{
                    **kwargs, "encoder_hidden_states": torch.zeros(2, 5, 3)}))  # fmt: skip

    def guide():
        for _ in range(6):
            assert max(differences(denoise(setup, PAG(**ALWAYS)), expected)) == 0

    run_together(fail, guide)
    assert snapshot(setup.model).keys() == before.keys()
    assert torch.equal(stock_forward(setup), stock_forward(case("sd3")))


def test_a_pass_prepared_in_a_thread_that_has_ended_is_nobodys():
    setup, guider = case("sd3"), SLG(**SLG_ALWAYS)
    stock, before = stock_forward(setup), snapshot(setup.model)

    def prepare():
        guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(0))
        guider.prepare_inputs(setup.pairs)
        for _ in range(3):
            guider.prepare_models(setup.model)

    for _ in range(4):  # numbers of threads come back
        run_together(prepare)
        run_together(lambda: torch.equal(stock_forward(setup), stock) or pytest.fail("perturbed"))
    assert torch.equal(stock_forward(setup), stock)
    assert snapshot(setup.model) == before


# ---- a patched pipeline with the same model ----


def test_a_patched_pipeline_and_a_guider_take_turns():
    setup = case("sd3")
    pipe = pipeline_of(setup.model)
    expected, stock = denoise(setup, PAG(**ALWAYS)), picture(pipe)
    pag_fast.patch(pipe, tiny_hosts.HOSTS[SD3].layers["middle"])
    patched, guider = picture(pipe), PAG(**ALWAYS)
    for _ in range(2):
        assert max(differences(denoise(setup, guider), expected)) == 0
        assert relative(picture(pipe), patched) < 1e-5
    pag_fast.unpatch(pipe)
    assert torch.equal(picture(pipe), stock)
    assert max(differences(denoise(setup, guider), expected)) == 0


@pytest.mark.parametrize("is_patched", [False, True])
def test_a_pipeline_called_between_preparation_and_forward(is_patched):
    """As a callback may: the pipeline's forwards are not the prepared one."""
    setup = case("sd3")
    pipe = pipeline_of(setup.model)
    expected = denoise(setup, PAG(**ALWAYS))
    if is_patched:
        pag_fast.patch(pipe, tiny_hosts.HOSTS[SD3].layers["middle"])
    wanted, pictures = picture(pipe), []
    result = denoise(
        setup, PAG(**ALWAYS), before_pass=lambda step, branch: pictures.append(picture(pipe))
    )
    assert max(differences(result, expected)) == 0
    assert len(pictures) == 3 * STEPS and all(relative(x, wanted) < 1e-5 for x in pictures)


def test_a_guider_in_the_callback_of_a_patched_pipeline():
    setup = case("sd3")
    pipe = pipeline_of(setup.model)
    expected = denoise(setup, PAG(**ALWAYS))
    pag_fast.patch(pipe, tiny_hosts.HOSTS[SD3].layers["middle"])
    wanted, seen = picture(pipe), []

    def callback(pipe, step, timestep, tensors):
        seen.append(max(differences(denoise(setup, PAG(**ALWAYS)), expected)))
        return tensors

    kwargs = tiny_hosts.call_kwargs(SD3, pipe, callback_on_step_end=callback)
    assert relative(tiny_hosts.latents(pipe, kwargs), wanted) < 1e-5
    assert seen == [0, 0]


def test_a_patched_pipeline_in_another_thread():
    setup = case("sd3")
    pipe = pipeline_of(setup.model)
    expected = denoise(setup, PAG(**ALWAYS))
    pag_fast.patch(pipe, tiny_hosts.HOSTS[SD3].layers["middle"])
    wanted = picture(pipe)

    def guide():
        for _ in range(6):
            assert max(differences(denoise(setup, PAG(**ALWAYS)), expected)) == 0

    def run():
        for _ in range(4):
            assert relative(picture(pipe), wanted) < 1e-5

    run_together(guide, run)


def test_a_pipeline_called_in_the_middle_of_a_perturbed_forward():
    """From a hook inside of the model: it runs without anything of the guider's."""
    setup = case("sd3")
    pipe = pipeline_of(setup.model)
    stock, inside, pictures = stock_forward(setup), [], []

    @pag_fast.runtime.compatibility.row_wise
    def hook(*_):
        if not inside:
            inside.append(1)
            pictures.append(stock_forward(setup))
            pictures.append(picture(pipe))
            inside.clear()

    wanted = picture(pipe)
    expected = denoise(setup, PAG(**ALWAYS))
    handle = setup.model.transformer_blocks[5].register_forward_hook(hook)
    result = denoise(setup, PAG(**ALWAYS))
    handle.remove()
    assert max(differences(result, expected)) == 0
    assert len(pictures) == 2 * 3 * STEPS
    assert all(torch.equal(x, stock) for x in pictures[::2])
    assert all(torch.equal(x, wanted) for x in pictures[1::2])


# ---- copies ----


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_between_passes(how):
    """A copy of an armed model is a stock one."""
    setup, copies = case("sd3"), []
    stock, expected = stock_forward(setup), denoise(setup, PAG(**ALWAYS))
    result = denoise(
        setup, PAG(**ALWAYS), before_pass=lambda step, branch: copies.append(how(setup.model))
    )
    assert max(differences(result, expected)) == 0
    for model in copies:
        assert not any("_compiled_call_impl" in vars(m) for m in model.modules())
        setup.model = model
        assert torch.equal(stock_forward(setup), stock)
        assert max(differences(denoise(setup, PAG(**ALWAYS)), expected)) == 0


@pytest.mark.parametrize("guider", [PAG(**ALWAYS), SLG(**SLG_ALWAYS)], ids=["pag", "slg"])
def test_what_is_captured_in_the_middle_of_a_pass_does_nothing_later(guider):
    """As accelerate's ``add_hook_to_module`` does: it keeps the forward that it finds."""
    setup = case("sd3")
    stock, expected = stock_forward(setup), denoise(setup, guider)
    captured = []

    @pag_fast.runtime.compatibility.row_wise
    def hook(*_):
        for block in setup.model.transformer_blocks:
            captured.append((block, vars(block).get("forward"), block.attn.processor))

    handle = setup.model.pos_embed.register_forward_hook(hook)
    denoise(setup, guider)
    handle.remove()
    assert any(forward is not None for _, forward, _ in captured)
    for block, forward, processor in captured:
        if forward is not None:
            block.forward = forward
        block.attn.processor = processor
    assert relative(stock_forward(setup), stock) < 1e-6
    assert max(differences(denoise(setup, guider), expected)) < 1e-6
    assert relative(stock_forward(setup), stock) < 1e-6
