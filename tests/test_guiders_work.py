"""Guiders: work that is left out, memory, and a model that is left as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from modular import (
    ALWAYS,
    SLG_ALWAYS,
    STEPS,
    case,
    denoise,
    differences,
    new_case,
    perturbed,
    slow,
    snapshot,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pag_fast.runtime.compatibility import row_wise

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance


def _flops_by_pass(setup, guider):
    """FLOPs of each pass of a step, in their order, and of cond's by module."""
    counts, counters = [], []

    def run(**kwargs):
        with FlopCounterMode(display=False) as counter:
            out = setup.model(**kwargs)
        counts.append(counter.get_total_flops())
        counters.append(counter.get_flop_counts())
        return out

    # fused attention of a CPU has FLOPs of its own to count
    with sdpa_kernel(SDPBackend.MATH):
        denoise(setup, guider, steps=1, run=run)
    root = type(setup.model).__name__
    modules = {
        name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counters[0].items()
    }
    return counts, modules


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_nothing_in_front_of_the_fork_runs_again(name):
    """Perturbed pass = cond's − the blocks in front − queries, keys and scores of the identity."""
    (cond, _, perturbed), modules = _flops_by_pass(
        case(name), PAG(perturbed_guidance_layers=[3], **ALWAYS)
    )
    blocks = [modules[f"transformer_blocks.{index}"] for index in range(6)]
    attn = "attn" if name == "sd3" else "attn1"
    prefix = f"transformer_blocks.3.{attn}"
    saved = sum(blocks[:3])
    if name == "pixart":
        saved += modules["caption_projection"]
        parts = ("to_q", "to_k", "to_v", "to_out.0")
        saved += modules[f"{prefix}.to_q"] + modules[f"{prefix}.to_k"]
        saved += modules[prefix] - sum(modules[f"{prefix}.{part}"] for part in parts)
    else:
        image, channels, rows = 16, 16, 2
        # image queries look at the text alone
        saved += 4 * rows * channels * image * image
    assert perturbed == cond - saved


def test_the_way_down_of_a_unet_does_not_run_again():
    (cond, _, perturbed), modules = _flops_by_pass(case("xl"), PAG(**ALWAYS))
    down = sum(modules[f"down_blocks.{index}"] for index in range(3))
    resnet = modules["mid_block.resnets.0"]
    saved = down + resnet
    for index in range(2):
        prefix = f"mid_block.attentions.0.transformer_blocks.{index}.attn1"
        parts = ("to_q", "to_k", "to_v", "to_out.0")
        saved += modules[f"{prefix}.to_q"] + modules[f"{prefix}.to_k"]
        saved += modules[prefix] - sum(modules[f"{prefix}.{part}"] for part in parts)
    assert perturbed == cond - saved


def test_skipped_blocks_and_those_in_front_do_not_run():
    guider = SLG(skip_layer_guidance_layers=[2, 3], **SLG_ALWAYS)
    (cond, _, perturbed), modules = _flops_by_pass(case("sd3"), guider)
    assert perturbed == cond - sum(modules[f"transformer_blocks.{index}"] for index in range(4))


def _recorded(guider, model):
    """The memory that a guider holds, in bytes."""
    resumption = guider._resumptions[model]
    values = [*(resumption._values or []), *(record.value for record in resumption.records)]
    found, todo = {}, values
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            todo += value
    return sum(found.values())


def test_memory_is_one_stream_and_is_freed():
    setup = case("sd3")
    guider, held = PAG(perturbed_guidance_layers=4, **ALWAYS), []

    def look(step, branch):
        held.append((branch, _recorded(guider, setup.model)))

    denoise(setup, guider, steps=2, before_pass=look)
    # [2, 16 + 5, 16] in fp32, and one element for each stream of the three blocks before
    stream, shapes = 2 * 21 * 16 * 4, 3 * 2 * 4
    held_in_a_step = [0, stream + shapes, stream + shapes]
    assert [size for _, size in held] == 2 * held_in_a_step
    assert _recorded(guider, setup.model) == 0
    assert not guider._resumptions[setup.model]._inputs.leaves


def test_a_unets_skips_that_nobody_reads_again_are_not_kept():
    setup = case("xl")
    guider = PAG(perturbed_guidance_layers="up_blocks.1.attentions.1", **ALWAYS)
    held = {}

    def look(step, branch):
        held[branch] = _recorded(guider, setup.model)

    denoise(setup, guider, steps=1, before_pass=look)
    # the last block reads a skip of [2, 8, 8, 8] and conv_in's, which runs again; the fork reads
    # [2, 16, 4, 4]; the shapes of the streams and of the other skips are one element each
    streams, skips = 3 + 1 + 1 + 2, 4
    assert held["pred_uncond"] == 4 * (2 * 8 * 8 * 8 + 2 * 16 * 4 * 4 + streams + skips)


def test_of_refiners_the_last_outputs_are_kept():
    setup, guider = new_case("lumina2", num_refiner_layers=2), PAG(**ALWAYS)
    result = denoise(setup, guider)
    records = guider._resumptions[setup.model].records
    names = {module: name for name, module in setup.model.named_modules()}
    kept = {names[record.module] for record in records if record.kept is None}
    assert kept == {"noise_refiner.1", "context_refiner.1", "layers.1"}
    assert len(records) == 2 + 2 + 2
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, perturbed(setup, None), active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5


def test_a_guider_keeps_no_model_alive():
    setup = case("sd3")
    guider = PAG(**ALWAYS)
    denoise(setup, guider, steps=1)
    model = weakref.ref(setup.model)
    del setup
    gc.collect()
    assert model() is None


# ---- nothing is left behind ----


@pytest.mark.parametrize("guider", [PAG(**ALWAYS), SLG(**SLG_ALWAYS)], ids=["pag", "slg"])
def test_between_passes_the_model_is_as_it_was(guider):
    setup = case("sd3")
    before = snapshot(setup.model)
    changed = []

    def look(step, branch):
        now = snapshot(setup.model)
        # an armed model differs in what its call goes through, and in nothing else
        changed.append({name for name in now if now[name] != before[name]})

    denoise(setup, guider, before_pass=look)
    assert changed == [{""}] * len(changed)
    assert snapshot(setup.model) == before


@pytest.mark.parametrize("broken", ["pred_cond", "pred_uncond", "pred_cond_skip"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_pass_leaves_nothing(broken, error):
    setup, guider = case("sd3"), PAG(perturbed_guidance_layers=3, **ALWAYS)
    expected = denoise(setup, guider)
    before, armed = snapshot(setup.model), []

    def fail(*_):
        if armed:
            raise error("in the middle of a pass")

    def look(step, branch):
        if step == 1 and branch == broken:
            armed.append(True)

    handle = setup.model.transformer_blocks[4].register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        denoise(setup, guider, before_pass=look)
    handle.remove()
    assert snapshot(setup.model) == before
    assert _recorded(guider, setup.model) == 0
    assert max(differences(denoise(setup, guider), expected)) == 0


def test_a_loop_that_raises_between_passes():
    """A ControlNet runs between ``prepare_models`` and the denoiser."""
    setup, guider = case("sd3"), PAG(**ALWAYS)
    expected = denoise(setup, guider)
    before = snapshot(setup.model)

    def fail(step, branch):
        if branch == "pred_cond_skip":
            raise RuntimeError("in the ControlNet")

    for another in (False, True):
        with pytest.raises(RuntimeError, match="ControlNet"):
            denoise(setup, guider, before_pass=fail)
        if another:
            guider = PAG(**ALWAYS)
        assert max(differences(denoise(setup, guider), expected)) == 0
        assert snapshot(setup.model) == before
    with pytest.raises(RuntimeError, match="ControlNet"):
        denoise(setup, guider, before_pass=fail)
    del guider
    values = {name: pair[0] for name, pair in setup.pairs.items()}
    with torch.no_grad():
        setup(setup.model, setup.sample, values)
    assert snapshot(setup.model) == before


def test_copies_begin_anew():
    setup, guider = case("sd3"), PAG(**ALWAYS)
    expected = denoise(setup, guider)
    for copied in (copy.deepcopy(guider), pickle.loads(pickle.dumps(guider))):
        assert not copied._resumptions
        assert max(differences(denoise(setup, copied), expected)) == 0


def test_replaced_forwards_stay():
    """Offloading replaces the forward of modules: ours comes before it, and puts it back."""
    setup = case("sd3")
    expected = denoise(setup, PAG(**ALWAYS))
    block = setup.model.transformer_blocks[1]
    calls, original = [], block.forward

    @row_wise
    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = forward
    result = denoise(setup, PAG(**ALWAYS))
    assert block.forward is forward
    assert len(calls) == 2 * STEPS  # cond and uncond
    assert max(differences(result, expected)) == 0
