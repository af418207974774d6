"""What resumed guidance saves, where it runs in full instead, and how it is asked for."""

from __future__ import annotations

import functools

import diffusers
import pytest
import tiny_hosts
import tiny_ltx2
import torch
from numerics import observing, relative
from resumed import LTX2, SD3, patched_guidance, resumed_latents, resumed_pipe
from torch.utils.flop_counter import FlopCounterMode

import pag_fast
from pag_fast.analysis.flops import count
from pag_fast.analysis.stock import guidance_cost
from pag_fast.pipelines.registry import HOSTS, PIPELINES, STOCK_PIPELINES
from pag_fast.runtime.stock_passes import RESUMED

BY_NAME = {entry.name: entry for entry in PIPELINES}


def _entered(pipe, fork):
    """Hooks that count how often the block in front of the fork runs, and how often that does."""
    counts = [0, 0]
    for place, index in enumerate((fork - 1, fork)):
        inner = pipe.transformer.transformer_blocks[index].ff
        inner.register_forward_hook(
            observing(lambda *_, place=place: counts.__setitem__(place, counts[place] + 1))
        )
    return counts


# ---- what is not resumed ----


def test_a_compiled_denoiser_runs_as_it_is():
    torch._dynamo.reset()
    pipe, skipped = tiny_hosts.build(SD3, num_layers=2), {"skip_guidance_layers": [1]}
    stock = resumed_latents(SD3, pipe, **skipped)
    pipe.transformer.compile(backend="eager")
    with patched_guidance(SD3, pipe), pytest.warns(UserWarning, match="the denoiser is compiled"):
        assert relative(resumed_latents(SD3, pipe, **skipped), stock) <= 1e-6
        assert RESUMED not in pipe._pag_fast.steps
    torch._dynamo.reset()


def test_blocks_that_are_compiled_one_by_one():
    torch._dynamo.reset()
    pipe, skipped = tiny_hosts.build(SD3, num_layers=3), {"skip_guidance_layers": [1]}
    stock = resumed_latents(SD3, pipe, **skipped)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with patched_guidance(SD3, pipe):
        assert relative(resumed_latents(SD3, pipe, **skipped), stock) <= 1e-6
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_a_hook_that_nobody_knows(name):
    pipe, calls = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2), []
    stock = resumed_latents(name, pipe)
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda *_: calls.append(1) and None)
    with patched_guidance(name, pipe), pytest.warns(UserWarning, match="runs as a whole"):
        assert torch.equal(resumed_latents(name, pipe), stock)
        assert RESUMED not in pipe._pag_fast.steps
    forwards = 4 + 3 if name == SD3 else 3 * 3
    assert len(calls) == forwards
    with patched_guidance(name, pipe, strict=True), pytest.raises(ValueError, match="strict=True"):
        resumed_latents(name, pipe)


def test_caches_and_offloading_by_group():
    pipe = tiny_ltx2.build(LTX2)
    stock = resumed_latents(LTX2, pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pag_fast.patched(pipe), pytest.warns(UserWarning, match="runs as a whole"):
        assert torch.equal(resumed_latents(LTX2, pipe), stock)


def test_a_callback_that_runs_the_model():
    """A forward that is nobody's, in the middle of a call."""
    pipe = resumed_pipe(LTX2)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        observing(lambda _, args, kwargs: calls.append(kwargs)), with_kwargs=True
    )

    def callback(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.transformer(**calls[0])
        return tensors

    stock = resumed_latents(LTX2, pipe, callback_on_step_end=callback)
    with pag_fast.patched(pipe):
        assert relative(resumed_latents(LTX2, pipe, callback_on_step_end=callback), stock) <= 1e-6
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3}
    handle.remove()


def test_two_pipelines_with_one_model():
    pipe = tiny_ltx2.build(LTX2)
    other = diffusers.LTX2ImageToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stock = resumed_latents("LTX2ImageToVideoPipeline", other)
    pag_fast.patch(pipe)
    pag_fast.patch(other)
    assert relative(resumed_latents("LTX2ImageToVideoPipeline", other), stock) <= 1e-6
    pag_fast.unpatch(other)
    assert torch.equal(resumed_latents("LTX2ImageToVideoPipeline", other), stock)
    assert pipe._pag_fast.steps == {} and isinstance(pipe, diffusers.LTX2Pipeline)


# ---- work ----


def test_blocks_in_front_do_not_run_again():
    pipe = tiny_ltx2.build(LTX2)
    counts = _entered(pipe, 3)
    with pag_fast.patched(pipe):
        resumed_latents(LTX2, pipe)
    # cond with uncond, spatio-temporal, isolated modalities: of these three the second
    assert counts == [3 * 2, 3 * 3]


@pytest.mark.parametrize("pag_scale", [0.0, 3.0])
@pytest.mark.parametrize("name", [SD3, LTX2])
def test_counted_work_is_what_is_predicted(name, pag_scale):
    if name == LTX2 and pag_scale:
        pytest.skip("no PAG there")
    pipe, counted = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2), []
    guidance, calls = BY_NAME[name].stock_guidance, []

    def before(_, args, kwargs):
        calls.append((FlopCounterMode(display=False), kwargs))
        if kwargs.get(guidance.argument):
            calls[-1][0].__enter__()

    def after(*_):
        if calls[-1][1].get(guidance.argument):
            calls[-1][0].__exit__(None, None, None)
            counted.append(calls[-1][0].get_total_flops())

    pipe.transformer.register_forward_pre_hook(observing(before), with_kwargs=True)
    pipe.transformer.register_forward_hook(observing(after))
    options = {"layers": ["blocks.4"], "pag_scale": pag_scale} if name == SD3 else {}
    if pag_scale:  # one product has the time's projections for all blocks, the first ones too
        options["fewer_launches"] = False
    with pag_fast.patched(pipe, **options):
        resumed_latents(name, pipe)
    extra = next(kwargs for _, kwargs in calls if kwargs.get(guidance.argument))
    extra = {k: v for k, v in extra.items() if k not in (guidance.argument, "return_dict")}
    changed = [3, 4] if name == SD3 else [3]
    twin = (tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2)).transformer
    cost = guidance_cost(twin, guidance, changed, lambda rows: dict(extra))
    # with PAG the session keeps what sees the prompt alone, too
    assert all(flops <= cost.patched for flops in counted) and len(counted) == 3
    if not pag_scale:
        assert set(counted) == {cost.patched}
    assert cost.patched < 0.6 * cost.stock


def test_ltx2_at_full_width():
    """Uncond and cond, spatio-temporal guidance, and isolated modalities.

    With block 4 of 7 in the place of block 28 of 48.
    """
    with torch.device("meta"):
        model = diffusers.LTX2VideoTransformer3DModel(num_layers=7, perturbed_attn=True).eval()
    frames, height, width, sound, text = 16, 16, 24, 126, 1024

    def inputs(rows):
        new = functools.partial(torch.empty, device="meta")
        return {
            "hidden_states": new(rows, frames * height * width, 128),
            "audio_hidden_states": new(rows, sound, 128),
            "encoder_hidden_states": new(rows, text, 3840),
            "audio_encoder_hidden_states": new(rows, text, 3840),
            "timestep": new(rows),
            "sigma": new(rows),
            "encoder_attention_mask": new(rows, text),
            "audio_encoder_attention_mask": new(rows, text),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": sound,
            "perturbation_mask": torch.zeros(rows),
        }

    guidance = BY_NAME[LTX2].stock_guidance
    cost = guidance_cost(model, guidance, [4], inputs)
    both = count(model, inputs(2))
    isolated = count(model, {**inputs(1), "isolate_modalities": True})
    stock, patched = both + cost.stock + isolated, both + cost.patched + isolated
    assert stock / patched >= 1.14
    assert 0.55 < (cost.stock - cost.patched) / cost.stock < 28 / 48 + 0.02


def test_sd35_medium_at_full_size():
    """Blocks 7 to 9 of 24 are skipped: those in front are twice in a stock step."""
    config = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
        "joint_attention_dim": 4096,
    }
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**config).eval()

    def inputs(rows):
        new = functools.partial(torch.empty, device="meta")
        return {
            "hidden_states": new(rows, 16, 128, 128),
            "timestep": new(rows),
            "encoder_hidden_states": new(rows, 333, 4096),
            "pooled_projections": new(rows, 2048),
        }

    cost = guidance_cost(model, BY_NAME[SD3].stock_guidance, [7, 8, 9], inputs)
    row, both = count(model, inputs(1)), count(model, inputs(2))
    # seven blocks of the early kind, of which a row has thirteen
    assert 0.3 < (cost.stock - cost.patched) / row < 0.4
    assert 1.13 < (both + cost.stock) / (both + cost.patched) < 1.14


# ---- how it is asked for ----


def test_options_and_descriptions():
    assert set(STOCK_PIPELINES) <= set(pag_fast.supported_pipelines())
    assert {n for n, e in BY_NAME.items() if e.stock_guidance} == {SD3, *STOCK_PIPELINES}
    pipe = resumed_pipe(LTX2)
    for options in ({"pag_scale": 1.0}, {"compile": True}):
        with pytest.raises(ValueError, match="LTX2Pipeline gets no PAG"):
            pag_fast.patch(pipe, **options)
    assert not hasattr(pipe, "_pag_fast")
    assert HOSTS[SD3].stock_guidance.argument == "skip_layers"


def test_pag_where_layers_are_named():
    """Its passes are observed then, and its own guidance is resumed beside PAG."""
    pipe = resumed_pipe(LTX2)
    stock = resumed_latents(LTX2, pipe)
    warned = pytest.warns(UserWarning, match="does more to the predictions than to weigh them")
    with pag_fast.patched(pipe, r"^transformer_blocks\.1\.attn1"), warned:
        assert pipe.do_perturbed_attention_guidance
        with_pag = resumed_latents(LTX2, pipe)
        assert pipe._pag_fast.steps["shared"] and pipe._pag_fast.steps[RESUMED]
    assert relative(with_pag, stock) > 1e-4
    with pag_fast.patched(pipe):
        assert relative(resumed_latents(LTX2, pipe), stock) < 1e-6
    assert torch.equal(resumed_latents(LTX2, pipe), stock)


def test_explained():
    pipe = resumed_pipe(LTX2)
    with pag_fast.patched(pipe):
        resumed_latents(LTX2, pipe)
        text = str(pag_fast.explain(pipe))
    assert "spatio-temporal guidance: its forward begins at the first block" in text
    assert f"{RESUMED}" in text
    assert "skip-layer guidance: its forward begins" in str(
        pag_fast.explain(pag_fast.patch(tiny_hosts.build(SD3), "blocks.1"), flops=False)
    )
    with pytest.raises(ValueError, match="derived from its first forward, which has not run yet"):
        pag_fast.layer_costs(tiny_ltx2.build(LTX2))


def test_copies_of_a_patched_pipeline():
    import copy
    import pickle

    pipe = pag_fast.patch(tiny_ltx2.build(LTX2))
    stock = resumed_latents(LTX2, pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(resumed_latents(LTX2, twin), stock)
        assert twin._pag_fast.steps[RESUMED] == 3
        pag_fast.unpatch(twin)
