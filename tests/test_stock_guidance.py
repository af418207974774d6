"""Guidance of stock pipelines that is resumed where it parts from cond: same picture, sooner."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import diffusers
import pytest
import tiny_hosts
import tiny_ltx2
import torch
from numerics import observing, relative
from torch.utils.flop_counter import FlopCounterMode

import pag_fast
from pag_fast.analysis.flops import count
from pag_fast.analysis.stock import guidance_cost
from pag_fast.pipelines.registry import HOSTS, PIPELINES, STOCK_PIPELINES
from pag_fast.runtime.compatibility import row_wise
from pag_fast.runtime.stock_passes import RESUMED, _CondRecord

SD3, LTX2 = "StableDiffusion3Pipeline", "LTX2Pipeline"
SKIP = {
    "skip_guidance_layers": [3, 4],
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
    "skip_layer_guidance_scale": 3.0,
}
BY_NAME = {entry.name: entry for entry in PIPELINES}


@functools.lru_cache(maxsize=4)
def _pipe(name):
    return tiny_hosts.build(name) if name == SD3 else tiny_ltx2.build(name)


def _kwargs(name, pipe, **more):
    if name == SD3:
        return tiny_hosts.call_kwargs(name, pipe, **{"steps": 4, **SKIP, **more})
    return tiny_ltx2.call_kwargs(name, **more)


def _latents(name, pipe, **more):
    made = tiny_hosts if name == SD3 else tiny_ltx2
    return made.latents(pipe, _kwargs(name, pipe, **more))


def _patched(name, pipe, **options):
    without_pag = {"layers": "blocks.1", "pag_scale": 0.0} if name == SD3 else {}
    return pag_fast.patched(pipe, **without_pag, **options)


def _without(name):
    """Arguments that turn the guidance off."""
    if name == SD3:
        return {"skip_guidance_layers": None}
    return {"stg_scale": 0.0, **({} if "HDR" in name else {"audio_stg_scale": 0.0})}


def _entered(pipe, fork):
    """Hooks that count how often the block in front of the fork runs, and how often that does."""
    counts = [0, 0]
    for place, index in enumerate((fork - 1, fork)):
        inner = pipe.transformer.transformer_blocks[index].ff
        inner.register_forward_hook(
            observing(lambda *_, place=place: counts.__setitem__(place, counts[place] + 1))
        )
    return counts


# ---- the same picture ----


def _everywhere():
    """One pipeline in every way, its variants with all there is in a batch."""
    for name in STOCK_PIPELINES:
        yield name, True, 2
        if name == LTX2:
            yield from ((name, True, 1), (name, False, 1), (name, False, 2))


@pytest.mark.parametrize(("name", "cfg", "batch"), _everywhere())
def test_ltx2(name, cfg, batch):
    pipe = _pipe(name)
    stock = _latents(name, pipe, cfg=cfg, batch=batch)
    assert relative(_latents(name, pipe, cfg=cfg, batch=batch, **_without(name)), stock) > 1e-3
    with pag_fast.patched(pipe):
        first = _latents(name, pipe, cfg=cfg, batch=batch)
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3} and not pipe._pag_fast.fallbacks
        again = _latents(name, pipe, cfg=cfg, batch=batch)
    assert relative(first, stock) <= 1e-6 and torch.equal(first, again)
    if not cfg:
        assert torch.equal(first, stock), "the batch is the same"
    assert torch.equal(_latents(name, pipe, cfg=cfg, batch=batch), stock)


@pytest.mark.parametrize("sd35", [False, True])
@pytest.mark.parametrize("layers", [[3, 4], [1], [5], [4, 2], [0], [17], [5, 17]])
def test_sd3(layers, sd35):
    own = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2, 3)} if sd35 else {}
    pipe = tiny_hosts.build(SD3, **own)
    stock = _latents(SD3, pipe, batch=2, skip_guidance_layers=layers)
    with _patched(SD3, pipe):
        patched = _latents(SD3, pipe, batch=2, skip_guidance_layers=layers)
        # the first step is never in the window; before block 0 there is nothing, and no block 17
        wanted = {} if layers in ([0], [17]) else {RESUMED: 3}
        assert dict(pipe._pag_fast.steps) == wanted and not pipe._pag_fast.fallbacks
    assert relative(patched, stock) <= 1e-6
    if not wanted:
        assert torch.equal(patched, stock)


@pytest.mark.parametrize("images", [{"num_images_per_prompt": 2}, {"batch": 2}])
@pytest.mark.parametrize("layers", ["blocks.0", "blocks.2", "blocks.3", "blocks.5"])
def test_sd3_beside_pag(layers, images):
    """Forks of PAG in front of the skipped blocks, at them, and behind."""
    pipe = _pipe(SD3)
    with pag_fast.patched(pipe, layers, pag_scale=3.0):
        both = _latents(SD3, pipe, **images)
        assert dict(pipe._pag_fast.steps) == {"shared": 4, RESUMED: 3}
        host = pipe._pag_fast.host
        pipe._pag_fast.host = dataclasses.replace(host, stock_guidance=None)
        whole = _latents(SD3, pipe, **images)
        assert pipe._pag_fast.steps == {"shared": 8, RESUMED: 3}
        # without PAG a row of text is for one picture
        alone = _latents(SD3, pipe, **images, pag_scale=0.0) if "batch" in images else None
    assert relative(both, whole) <= 1e-6
    assert alone is None or relative(alone, both) > 1e-3, "PAG makes no difference"


@pytest.mark.parametrize("pag_scale", [0.0, 3.0])
def test_nothing_is_shared_where_that_is_asked_for(pag_scale):
    """So that ``verify`` compares with forwards that are whole."""
    pipe = _pipe(SD3)
    with pag_fast.patched(pipe, "blocks.2", pag_scale=pag_scale):
        resumed = _latents(SD3, pipe)
    with pag_fast.patched(pipe, "blocks.2", pag_scale=pag_scale, share_branches=False):
        assert relative(_latents(SD3, pipe), resumed) <= 1e-6
        assert RESUMED not in pipe._pag_fast.steps


def test_several_branches_beside_it():
    pipe = _pipe(SD3)
    branches = [
        pag_fast.Branch(["blocks.1"], "identity", 2.0),
        pag_fast.Branch(["blocks.2"], "skip", 1.0),
    ]
    with pag_fast.patched(pipe, branches=branches):
        both = _latents(SD3, pipe, batch=2)
        assert pipe._pag_fast.steps[RESUMED] == 3
        pipe._pag_fast.host = dataclasses.replace(pipe._pag_fast.host, stock_guidance=None)
        assert relative(both, _latents(SD3, pipe, batch=2)) <= 1e-6


@pytest.mark.parametrize("window", [(0.0, 0.4), (0.3, 1.0), (0.9, 1.0)])
def test_windows(window):
    start, stop = window
    more = {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop, "steps": 6}
    pipe = _pipe(SD3)
    stock, inside = _latents(SD3, pipe, **more), sum(6 * start < i < 6 * stop for i in range(6))
    with _patched(SD3, pipe):
        assert relative(_latents(SD3, pipe, **more), stock) <= 1e-6
        assert pipe._pag_fast.steps[RESUMED] == inside


def test_outside_of_the_window_are_kept_no_rows():
    """Where no such forward follows, nothing is recorded."""
    pipe, recorded = tiny_hosts.build(SD3), []
    more = {"skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.6, "steps": 6}
    record = _CondRecord.note

    def note(self, out):
        recorded.append(1)
        return record(self, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CondRecord, "note", note)
        with _patched(SD3, pipe):
            _latents(SD3, pipe, **more)
            assert pipe._pag_fast.steps[RESUMED] == 2
    assert len(recorded) == 2 * 3, "three blocks in front, in steps 2 and 3"


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_cfg_and_guidance_off(name):
    pipe = _pipe(name)
    off = {"cfg": False} if name == SD3 else _without(name)
    stock = _latents(name, pipe, **off)
    with _patched(name, pipe):
        assert torch.equal(_latents(name, pipe, **off), stock)
        assert not pipe._pag_fast.steps and not pipe._pag_fast.fallbacks


def test_a_prompt_that_a_callback_changes_is_seen():
    """SD3's skip-layer pass goes on with the first prompt: from then on it is not cond's."""
    pipe = _pipe(SD3)

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].roll(1, -1)
        return tensors

    more = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    stock = _latents(SD3, pipe, **more)
    with _patched(SD3, pipe):
        with pytest.warns(UserWarning, match="runs as a whole: it was called with other arguments"):
            patched = _latents(SD3, pipe, **more)
        assert pipe._pag_fast.steps[RESUMED] == 1
    assert relative(patched, stock) <= 1e-6


def test_a_prompt_that_is_changed_in_place_is_seen():
    pipe = _pipe(SD3)

    def callback(pipe, step, timestep, tensors):
        tensors["prompt_embeds"][-1:].mul_(0.5)
        return tensors

    more = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with torch.no_grad():
        stock = _latents(SD3, pipe, **more)
        with _patched(SD3, pipe):
            with pytest.warns(UserWarning, match="other arguments than cond's"):
                assert relative(_latents(SD3, pipe, **more), stock) <= 1e-6
            assert RESUMED not in pipe._pag_fast.steps


# ---- nothing is left, and nothing is kept ----


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_after_an_exception(name, snapshot):
    pipe = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2)
    stock = _latents(name, pipe)
    before = snapshot(pipe)
    pag_fast.patch(pipe, **({"layers": "blocks.1", "pag_scale": 0.0} if name == SD3 else {}))
    patched = _latents(name, pipe)
    for index, wanted in ((4, 2), (1, 2), (4, 4)):  # in a pass that is resumed, and in others
        between, calls = snapshot(pipe), []

        def fail(*_, calls=calls, wanted=wanted):
            calls.append(1)
            if len(calls) == wanted:
                raise ZeroDivisionError

        block = pipe.transformer.transformer_blocks[index]
        handle = block.ff.register_forward_hook(observing(fail))
        with pytest.raises(ZeroDivisionError):
            _latents(name, pipe)
        handle.remove()
        assert snapshot(pipe) == between
    assert torch.equal(_latents(name, pipe), patched)
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(_latents(name, pipe), stock)


@pytest.mark.parametrize("layers", [None, "blocks.2"])
@pytest.mark.parametrize("name", [SD3, LTX2])
def test_what_is_kept_is_freed_within_the_step(name, layers):
    """Of what the last block in front returns, no tensor lives until the step's end."""
    if name == LTX2 and layers:
        pytest.skip("no PAG there")
    pipe, kept = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2), []
    seen = []
    block = pipe.transformer.transformer_blocks[2]

    def callback(pipe, step, timestep, tensors):
        gc.collect()
        seen.append(sum(ref() is not None for ref in kept))
        return tensors

    own = type(block).forward

    def forward(*args, **kwargs):
        out = own(block, *args, **kwargs)
        kept.extend(weakref.ref(x) for x in out)
        return out

    block.forward = row_wise(forward)
    options = {"pag_scale": 3.0} if layers else {}
    with pag_fast.patched(pipe, layers, **options) if layers else _patched(name, pipe):
        _latents(name, pipe, callback_on_step_end=callback)
        assert pipe._pag_fast.steps[RESUMED] == 3
    assert kept and set(seen) == {0}


# ---- what is not resumed ----


def test_a_compiled_denoiser_runs_as_it_is():
    torch._dynamo.reset()
    pipe, skipped = tiny_hosts.build(SD3, num_layers=2), {"skip_guidance_layers": [1]}
    stock = _latents(SD3, pipe, **skipped)
    pipe.transformer.compile(backend="eager")
    with _patched(SD3, pipe), pytest.warns(UserWarning, match="the denoiser is compiled"):
        assert relative(_latents(SD3, pipe, **skipped), stock) <= 1e-6
        assert RESUMED not in pipe._pag_fast.steps
    torch._dynamo.reset()


def test_blocks_that_are_compiled_one_by_one():
    torch._dynamo.reset()
    pipe, skipped = tiny_hosts.build(SD3, num_layers=3), {"skip_guidance_layers": [1]}
    stock = _latents(SD3, pipe, **skipped)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with _patched(SD3, pipe):
        assert relative(_latents(SD3, pipe, **skipped), stock) <= 1e-6
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [SD3, LTX2])
def test_a_hook_that_nobody_knows(name):
    pipe, calls = tiny_hosts.build(SD3) if name == SD3 else tiny_ltx2.build(LTX2), []
    stock = _latents(name, pipe)
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda *_: calls.append(1) and None)
    with _patched(name, pipe), pytest.warns(UserWarning, match="runs as a whole"):
        assert torch.equal(_latents(name, pipe), stock)
        assert RESUMED not in pipe._pag_fast.steps
    forwards = 4 + 3 if name == SD3 else 3 * 3
    assert len(calls) == forwards
    with _patched(name, pipe, strict=True), pytest.raises(ValueError, match="strict=True"):
        _latents(name, pipe)


def test_caches_and_offloading_by_group():
    pipe = tiny_ltx2.build(LTX2)
    stock = _latents(LTX2, pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pag_fast.patched(pipe), pytest.warns(UserWarning, match="runs as a whole"):
        assert torch.equal(_latents(LTX2, pipe), stock)


def test_a_callback_that_runs_the_model():
    """A forward that is nobody's, in the middle of a call."""
    pipe = _pipe(LTX2)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        observing(lambda _, args, kwargs: calls.append(kwargs)), with_kwargs=True
    )

    def callback(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.transformer(**calls[0])
        return tensors

    stock = _latents(LTX2, pipe, callback_on_step_end=callback)
    with pag_fast.patched(pipe):
        assert relative(_latents(LTX2, pipe, callback_on_step_end=callback), stock) <= 1e-6
        assert dict(pipe._pag_fast.steps) == {RESUMED: 3}
    handle.remove()


def test_two_pipelines_with_one_model():
    pipe = tiny_ltx2.build(LTX2)
    other = diffusers.LTX2ImageToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stock = _latents("LTX2ImageToVideoPipeline", other)
    pag_fast.patch(pipe)
    pag_fast.patch(other)
    assert relative(_latents("LTX2ImageToVideoPipeline", other), stock) <= 1e-6
    pag_fast.unpatch(other)
    assert torch.equal(_latents("LTX2ImageToVideoPipeline", other), stock)
    assert pipe._pag_fast.steps == {} and isinstance(pipe, diffusers.LTX2Pipeline)


# ---- work ----


def test_blocks_in_front_do_not_run_again():
    pipe = tiny_ltx2.build(LTX2)
    counts = _entered(pipe, 3)
    with pag_fast.patched(pipe):
        _latents(LTX2, pipe)
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
        _latents(name, pipe)
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
    pipe = _pipe(LTX2)
    for options in ({"pag_scale": 1.0}, {"compile": True}):
        with pytest.raises(ValueError, match="LTX2Pipeline gets no PAG"):
            pag_fast.patch(pipe, **options)
    assert not hasattr(pipe, "_pag_fast")
    assert HOSTS[SD3].stock_guidance.argument == "skip_layers"


def test_pag_where_layers_are_named():
    """Its passes are observed then, and its own guidance is resumed beside PAG."""
    pipe = _pipe(LTX2)
    stock = _latents(LTX2, pipe)
    warned = pytest.warns(UserWarning, match="does more to the predictions than to weigh them")
    with pag_fast.patched(pipe, r"^transformer_blocks\.1\.attn1"), warned:
        assert pipe.do_perturbed_attention_guidance
        with_pag = _latents(LTX2, pipe)
        assert pipe._pag_fast.steps["shared"] and pipe._pag_fast.steps[RESUMED]
    assert relative(with_pag, stock) > 1e-4
    with pag_fast.patched(pipe):
        assert relative(_latents(LTX2, pipe), stock) < 1e-6
    assert torch.equal(_latents(LTX2, pipe), stock)


def test_explained():
    pipe = _pipe(LTX2)
    with pag_fast.patched(pipe):
        _latents(LTX2, pipe)
        text = str(pag_fast.explain(pipe))
    assert "spatio-temporal guidance: its forward begins at the first block" in text
    assert f"{RESUMED}" in text
    assert "skip-layer guidance: its forward begins" in str(
        pag_fast.explain(pag_fast.patch(tiny_hosts.build(SD3), "blocks.1"), flops=False)
    )
    with pytest.raises(ValueError, match="no layers to choose"):
        pag_fast.layer_costs(pipe)


def test_copies_of_a_patched_pipeline():
    import copy
    import pickle

    pipe = pag_fast.patch(tiny_ltx2.build(LTX2))
    stock = _latents(LTX2, pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(_latents(LTX2, twin), stock)
        assert twin._pag_fast.steps[RESUMED] == 3
        pag_fast.unpatch(twin)
