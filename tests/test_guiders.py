"""The guiders for modular pipelines: parity, work left out, and what stock gets wrong."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from modular import STEPS, case, denoise, naive, slow
from numerics import relative
from torch.utils.flop_counter import FlopCounterMode

from pag_fast.layers import resolve

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

PAG, SLG = guiders.PerturbedAttentionGuidance, guiders.SkipLayerGuidance
# every step is perturbed
ALWAYS = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
SLG_ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
CFG = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
CASES = {
    "sd": ["default", "several"],
    "xl": ["default", "several", "up"],
    "motion": ["several", "last"],
    "sd3": ["default", "several", "last", "first"],
    "sd35": ["several", "attn2"],
    "hunyuan": ["default", "last"],
    "pixart": ["default", "first"],
    "sana": ["several"],
}


def _perturbed(setup, layers):
    """The context of the naive perturbed forward."""
    if layers is None:
        layers = "mid" if hasattr(setup.model, "down_blocks") else 3
    return lambda: naive(list(resolve(setup.model, layers).values()))


def _differences(result, expected):
    return [relative(a, b) for a, b in zip(result.predictions, expected.predictions, strict=True)]


# ---- the same pictures ----


@CFG
@pytest.mark.parametrize(
    ("name", "which"), [(name, which) for name, sets in CASES.items() for which in sets]
)
def test_pag_equals_three_whole_forwards(name, which, cfg):
    setup = case(name)
    layers, scale = setup.layers[which], 5.0 if cfg else 1.0
    guider = PAG(guidance_scale=scale, perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    perturbed = _perturbed(setup, layers)
    arguments = {"guidance_scale": scale, "scale": 2.8}
    expected = slow(setup, perturbed, active=range(STEPS), **arguments)
    assert max(_differences(result, expected)) < 1e-5
    assert {len(passes) for passes in result.passes} == {3 if cfg else 2}
    assert not guider._warned, "the perturbed pass ran as a whole"
    # perturbing changes the picture
    without = slow(setup, perturbed, active=(), **arguments)
    assert min(_differences(result, without)) > 1e-3


@CFG
@pytest.mark.parametrize("original", [True, False])
def test_formulas_are_those_of_diffusers(cfg, original):
    scale = 5.0 if cfg else float(not original)
    arguments = {
        "guidance_scale": scale,
        "guidance_rescale": 0.7,
        "use_original_formulation": original,
    }
    for active in (True, False):
        skip = {"perturbed_guidance_scale": 2.8 if active else 0.0, "perturbed_guidance_layers": 0}
        ours, stock = PAG(**arguments, **skip), diffusers.PerturbedAttentionGuidance(
            **arguments, **skip
        )  # fmt: skip
        names = ["pred_cond"] + ["pred_uncond"] * cfg + ["pred_cond_skip"] * active
        predictions = {name: torch.randn(2, 4, 8, 8) for name in names}
        out, expected = ours.forward(**predictions), stock.forward(**predictions)
        assert relative(out.pred, expected.pred) < 1e-6
        assert out.pred_cond is predictions["pred_cond"]
        assert out.pred_uncond is predictions.get("pred_uncond")


@pytest.mark.parametrize("layers", ["mid", "up_blocks.1.attentions.1", "down_blocks.1"])
@pytest.mark.parametrize("extra", ["controlnet", "freeu"])
def test_what_writes_into_a_unets_streams(extra, layers):
    setup = case("sd")
    if extra == "freeu":
        setup.model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    else:
        shapes = [(8, 8), (8, 8), (8, 4), (16, 4), (16, 2), (16, 2)]
        setup.fixed["down_block_additional_residuals"] = tuple(
            torch.randn(2, channels, size, size) for channels, size in shapes
        )
        setup.fixed["mid_block_additional_residual"] = torch.randn(2, 16, 2, 2)
    guider = PAG(perturbed_guidance_layers=layers, **ALWAYS)
    result = denoise(setup, guider)
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, _perturbed(setup, layers), active=range(STEPS), **scales)
    assert max(_differences(result, expected)) < 1e-5
    assert not guider._warned


def test_a_controlnet_of_sd3():
    setup = case("sd3")
    setup.fixed["block_controlnet_hidden_states"] = [torch.randn(2, 16, 16) for _ in range(3)]
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, _perturbed(setup, 3), active=range(STEPS), **scales)
    assert max(_differences(denoise(setup, PAG(**ALWAYS)), expected)) < 1e-5


def test_inference_mode():
    setup = case("xl")
    expected = denoise(setup, PAG(**ALWAYS))
    with torch.inference_mode():
        result = denoise(setup, PAG(**ALWAYS))
    assert max(_differences(result, expected)) == 0


def test_a_block_state_is_as_good():
    setup = case("pixart")
    guider = PAG(**ALWAYS)
    expected = denoise(setup, guider)
    result = denoise(setup, guider, from_block_state=True)
    assert all(
        torch.equal(a, b) for a, b in zip(result.predictions, expected.predictions, strict=True)
    )


def test_cfg_window_and_switch():
    setup = case("sd3")
    guider = PAG(start=0.2, stop=0.8, perturbed_guidance_start=0.4, perturbed_guidance_stop=1.0)
    passes = denoise(setup, guider, steps=5).passes
    cond, uncond, perturbed = "pred_cond", "pred_uncond", "pred_cond_skip"
    assert passes == [[cond], [cond, uncond], [cond, uncond], [cond, uncond, perturbed],
                      [cond, perturbed]]  # fmt: skip
    guider.disable()
    assert denoise(setup, guider).passes == [[cond]] * STEPS
    guider.enable()
    assert denoise(setup, guider, steps=5).passes == passes


@contextmanager
def _skipped(blocks, returns):
    """Blocks that return what they are given, the plain way."""
    before = [block.forward for block in blocks]
    for block in blocks:
        block.forward = returns
    yield
    for block in blocks:
        del block.forward
    assert [block.forward for block in blocks] == before


@CFG
@pytest.mark.parametrize("name", ["sd3", "pixart", "xl"])
def test_slg_equals_three_whole_forwards(name, cfg):
    setup = case(name)
    scale = 5.0 if cfg else 1.0
    if name == "xl":
        config = LayerSkipConfig([0, 1], fqn="mid_block.attentions.0.transformer_blocks")
        guider = SLG(guidance_scale=scale, skip_layer_config=config, **SLG_ALWAYS)
        blocks = setup.model.mid_block.attentions[0].transformer_blocks
    else:
        layers = [2, 4]
        guider = SLG(guidance_scale=scale, skip_layer_guidance_layers=layers, **SLG_ALWAYS)
        blocks = [setup.model.transformer_blocks[i] for i in layers]

    def returns(hidden_states, encoder_hidden_states=None, **_):
        both = (encoder_hidden_states, hidden_states)
        return both if name == "sd3" else hidden_states

    result = denoise(setup, guider)
    arguments = {"guidance_scale": scale, "scale": 2.8}
    expected = slow(setup, lambda: _skipped(blocks, returns), active=range(STEPS), **arguments)
    assert max(_differences(result, expected)) < 1e-5
    without = slow(setup, lambda: None, active=(), **arguments)
    assert min(_differences(result, without)) > 1e-3
    assert not guider._warned, "the perturbed pass ran as a whole"


@pytest.mark.parametrize(
    "config",
    [
        {"skip_attention": True, "skip_ff": False},
        {"skip_attention": False, "skip_ff": True},
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    ],
    ids=["attention", "feed-forward", "scores"],
)
def test_slg_of_parts_equals_stock(config):
    """On a model for which stock's hooks are right."""
    fqn = "mid_block.attentions.0.transformer_blocks"
    setup = case("sd")
    made = [
        cls(skip_layer_config=LayerSkipConfig([0], fqn=fqn, **config), **SLG_ALWAYS)
        for cls in (SLG, diffusers.SkipLayerGuidance)
    ]
    result, expected = (denoise(setup, guider) for guider in made)
    # stock leaves step 0 out
    assert relative(result[0], expected[0]) > 1e-3
    made[0] = made[0].new(skip_layer_guidance_start=0.01)
    assert max(_differences(denoise(setup, made[0]), expected)) < 1e-5


def test_modular_sdxl():
    """A pipeline of diffusers, end to end, in the steps in which stock perturbs too."""
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    setup = case("xl", batch=1)
    blocks = StableDiffusionXLAutoBlocks()
    for name in ("text_encoder", "ip_adapter", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled = setup.pairs["encoder_hidden_states"], setup.pairs["text_embeds"]

    def run(guider):
        pipe.update_components(
            unet=setup.model,
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
            guider=guider,
            vae=tiny_vae,
        )
        return pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            pooled_prompt_embeds=pooled[0],
            negative_pooled_prompt_embeds=pooled[1],
            height=16,
            width=16,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )

    import tiny

    tiny_vae = tiny.vae()
    fqn = "mid_block.attentions.0.transformer_blocks"
    config = LayerSkipConfig([0, 1], fqn=fqn, skip_attention=False, skip_attention_scores=True,
                             skip_ff=False)  # fmt: skip
    stock = run(diffusers.PerturbedAttentionGuidance(
        perturbed_guidance_config=config, perturbed_guidance_stop=1.0))  # fmt: skip
    ours = run(PAG(perturbed_guidance_layers="mid", perturbed_guidance_stop=1.0))
    assert relative(ours, stock) < 1e-5
    assert relative(ours, run(diffusers.ClassifierFreeGuidance(7.5))) > 1e-4


# ---- the work that is left out ----


def _flops_by_pass(setup, guider):
    """FLOPs of each pass of a step, in their order, and of cond's by module."""
    setup.model.to("meta")
    counts, counters = [], []

    def model(**kwargs):
        with FlopCounterMode(display=False) as counter:
            out = setup.model(**kwargs)
        counts.append(counter.get_total_flops())
        counters.append(counter.get_flop_counts())
        return out

    for name, pair in setup.pairs.items():
        setup.pairs[name] = tuple(x.to("meta") for x in pair)
    setup.fixed = {k: v.to("meta") if hasattr(v, "to") else v for k, v in setup.fixed.items()}
    setup.sample = setup.sample.to("meta")
    stock_call = type(setup).__call__
    prepared = setup.model

    class Counted(type(setup)):
        def __call__(self, _, sample, values):
            return stock_call(self, model, sample, values)

    setup.__class__ = Counted
    denoise(setup, guider, steps=1, model=prepared)
    root = type(prepared).__name__
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


def test_a_guider_keeps_no_model_alive():
    setup = case("sd3")
    guider = PAG(**ALWAYS)
    denoise(setup, guider, steps=1)
    model = weakref.ref(setup.model)
    del setup
    gc.collect()
    assert model() is None


# ---- stock's defects ----


def test_without_cfg_the_perturbed_pass_is_conditional_and_perturbed():
    setup = case("sd")
    stock = diffusers.PerturbedAttentionGuidance(
        guidance_scale=1.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=LayerSkipConfig(
            [0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=False,
            skip_attention_scores=True, skip_ff=False),
    )  # fmt: skip
    ours = PAG(guidance_scale=1.0, perturbed_guidance_stop=1.0)
    text = setup.pairs["encoder_hidden_states"]
    for guider, index in ((ours, 0), (stock, 1)):
        guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(0))
        batch = guider.prepare_inputs(setup.pairs)[1]
        assert batch.__guidance_identifier__ == "pred_cond_skip"
        assert batch.encoder_hidden_states is text[index]
    seen = []
    for guider in (ours, stock):
        guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(0))
        with torch.no_grad():
            for _ in range(2):
                guider.prepare_models(setup.model)
                out = setup(setup.model, setup.sample, {"encoder_hidden_states": text[0]})
                guider.cleanup_models(setup.model)
                seen.append(out)
    assert relative(seen[1], seen[0]) > 1e-3
    assert torch.equal(seen[3], seen[2]), "stock perturbs nothing"


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9])
def test_few_steps_have_a_perturbed_one(steps, caplog):
    guider = PAG()
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0])
    with caplog.at_level(logging.WARNING, "pag_fast"):
        active = [_steps_of(g, steps) for g in (guider, stock)]
    assert active == [[min(1, steps - 1)], []]
    assert sum("holds no whole step" in record.message for record in caplog.records) == 1


def _steps_of(guider, steps):
    active = []
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
        if guider.num_conditions == 3:
            active.append(step)
    return active


@pytest.mark.parametrize("window", [(0.01, 0.2), (0.1, 0.5), (0.3, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [20, 28, 30, 50])
def test_windows_that_work_in_stock_are_the_same(window, steps):
    names = ("perturbed_guidance_start", "perturbed_guidance_stop")
    arguments = dict(zip(names, window, strict=True))
    ours = PAG(**arguments)
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0], **arguments)
    assert _steps_of(ours, steps) == _steps_of(stock, steps)
    assert not ours._warned


def test_step_0_is_perturbed_where_the_start_is_0():
    assert _steps_of(PAG(**ALWAYS), 3) == [0, 1, 2]
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0], **ALWAYS)
    assert _steps_of(stock, 3) == [1, 2]


def test_an_index_or_a_list_of_them():
    setup = case("sd3")
    one = denoise(setup, PAG(perturbed_guidance_layers=3, **ALWAYS))
    assert torch.equal(one[-1], denoise(setup, PAG(perturbed_guidance_layers=[3], **ALWAYS))[-1])
    assert torch.equal(one[-1], denoise(setup, PAG(**ALWAYS))[-1])
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=3, **ALWAYS)
    with pytest.raises(TypeError, match="has no len"):
        denoise(setup, stock)
    stock = diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[3], **SLG_ALWAYS)
    with pytest.raises(TypeError, match="has no len"):
        denoise(setup, stock)


def test_stock_refuses_sd3_and_crashes_when_it_skips_its_blocks():
    setup = case("sd3")
    stock = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[3], **ALWAYS)
    with pytest.raises(ValueError, match="not registered"):
        denoise(setup, stock)
    _restore(setup.model)
    # parity of ours: test_slg_equals_three_whole_forwards
    stock = diffusers.SkipLayerGuidance(skip_layer_config=LayerSkipConfig([3]), **SLG_ALWAYS)
    with pytest.raises(RuntimeError):
        denoise(setup, stock)
    _restore(setup.model)


def _restore(model):
    for module in model.modules():
        vars(module).pop("forward", None)


def test_blocks_are_looked_for_in_a_fixed_order():
    from pag_fast.guiders.selection import stack_of

    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    name, stack = stack_of(model)
    assert name == "transformer_blocks" and stack is model.transformer_blocks
    assert stack_of(model, "single_transformer_blocks")[1] is model.single_transformer_blocks
    with pytest.raises(ValueError, match=r"(?s)no common numbering.*mid_block\.attentions\.0"):
        stack_of(case("sd").model)


def test_attention_that_is_not_pytorchs():
    """Stock waits for ``scaled_dot_product_attention`` to be called."""
    setup = case("sd")
    for module in resolve(setup.model, "attn").values():
        module.set_processor(AttnProcessor())
    fqn = "mid_block.attentions.0.transformer_blocks"
    config = {"indices": [0], "fqn": fqn, "skip_attention": False, "skip_ff": False,
              "skip_attention_scores": True}  # fmt: skip
    arguments = {"guidance_scale": 5.0, "perturbed_guidance_config": config}
    stock = diffusers.PerturbedAttentionGuidance(**arguments, perturbed_guidance_stop=1.0)
    expected = {
        active: slow(setup, _perturbed(setup, "mid"), guidance_scale=5.0, scale=2.8, active=active)
        for active in ((), range(STEPS))
    }
    with pytest.raises(ValueError, match="not registered"):
        denoise(setup, stock)
    _restore(setup.model)
    ours = denoise(setup, PAG(**arguments, **ALWAYS))
    assert max(_differences(ours, expected[range(STEPS)])) < 1e-5
    assert min(_differences(ours, expected[()])) > 1e-3


# ---- torch.compile ----


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "how", "graphs"),
    [("sd3", "in place", 2), ("sd3", "wrapped", 2), ("sd", "in place", 2), ("sd3", "blocks", 3)],
)
def test_the_perturbed_pass_is_one_more_graph(name, how, graphs, fresh_dynamo):
    """Of SD3's blocks the last has a graph of its own in any case."""
    from torch._dynamo.testing import CompileCounter

    small = {
        "sd3": {"num_layers": 3},
        "sd": {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    }
    setup, counter = case(name, **small[name]), CompileCounter()
    guider = PAG(perturbed_guidance_stop=0.7)
    expected = denoise(setup, guider, steps=5)
    assert [len(passes) for passes in expected.passes] == [2, 3, 3, 2, 2]
    model = setup.model
    if how == "wrapped":
        model = torch.compile(model, fullgraph=True, backend=counter)
        stock = diffusers.PerturbedAttentionGuidance(
            perturbed_guidance_config=LayerSkipConfig([0], fqn="transformer_blocks")
        )
        with pytest.raises(ValueError, match="Could not find transformer_blocks"):
            denoise(setup, stock, model=model, steps=20)
        counter.clear()
        torch._dynamo.reset()
    elif how == "in place":
        model.compile(fullgraph=True, backend=counter)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        result = denoise(setup, guider, model=model, steps=5)
        assert max(_differences(result, expected)) < 1e-5
    assert counter.frame_count == graphs
    assert not guider._warned


# ---- nothing is left behind ----


def _snapshot(model):
    return {
        name: (set(vars(m)), vars(m).get("forward"), getattr(m, "processor", None),
               vars(m).get("_compiled_call_impl"), len(m._forward_hooks),
               len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("guider", [PAG(**ALWAYS), SLG(**SLG_ALWAYS)], ids=["pag", "slg"])
def test_between_passes_the_model_is_as_it_was(guider):
    setup = case("sd3")
    before = _snapshot(setup.model)
    changed = []

    def look(step, branch):
        now = _snapshot(setup.model)
        # an armed model differs in what its call goes through, and in nothing else
        changed.append({name for name in now if now[name] != before[name]})

    denoise(setup, guider, before_pass=look)
    assert changed == [{""}] * len(changed)
    assert _snapshot(setup.model) == before


@pytest.mark.parametrize("broken", ["pred_cond", "pred_uncond", "pred_cond_skip"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_pass_leaves_nothing(broken, error):
    setup, guider = case("sd3"), PAG(perturbed_guidance_layers=3, **ALWAYS)
    expected = denoise(setup, guider)
    before, armed = _snapshot(setup.model), []

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
    assert _snapshot(setup.model) == before
    assert _recorded(guider, setup.model) == 0
    assert max(_differences(denoise(setup, guider), expected)) == 0


def test_replaced_forwards_stay():
    """Offloading replaces the forward of modules: ours comes before it, and puts it back."""
    setup = case("sd3")
    expected = denoise(setup, PAG(**ALWAYS))
    block = setup.model.transformer_blocks[1]
    calls, original = [], block.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = forward
    result = denoise(setup, PAG(**ALWAYS))
    assert block.forward is forward
    assert len(calls) == 2 * STEPS  # cond and uncond
    assert max(_differences(result, expected)) == 0


# ---- where a pass cannot be resumed ----


def test_modules_with_hooks_of_diffusers_run_in_full():
    """A cache or an offloading by groups expects every block to run."""
    from diffusers.hooks import HookRegistry, ModelHook

    setup = case("sd3")
    expected = denoise(setup, PAG(**ALWAYS))
    block = setup.model.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "test")
    guider = PAG(**ALWAYS)
    assert max(_differences(denoise(setup, guider), expected)) < 1e-6
    assert [m for m in guider._warned if "hooks of diffusers" in m]


def test_a_pass_with_other_arguments_runs_in_full():
    setup = case("sd3")
    guider = PAG(**ALWAYS)
    guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(0))
    cond, _, perturbed = guider.prepare_inputs(setup.pairs)
    values = {name: getattr(cond, name) for name in setup.pairs}
    with torch.no_grad():
        guider.prepare_models(setup.model)
        setup(setup.model, setup.sample, values)
        guider.cleanup_models(setup.model)
        guider.prepare_models(setup.model)
        guider.cleanup_models(setup.model)
        guider.prepare_models(setup.model)
        out = setup(setup.model, setup.sample + 1, values)
        guider.cleanup_models(setup.model)
        with _perturbed(setup, None)():
            expected = setup(setup.model, setup.sample + 1, values)
    assert relative(out, expected) < 1e-5
    assert [m for m in guider._warned if "other arguments" in m]


def test_a_pass_of_several_forwards_runs_in_full():
    """Sliding windows: what was recorded last belongs to one window alone."""
    setup, guider = case("sd3"), PAG(**ALWAYS)
    values = {name: pair[0] for name, pair in setup.pairs.items()}
    windows = [setup.sample, setup.sample + 1]
    with torch.no_grad(), _perturbed(setup, None)():
        expected = [setup(setup.model, window, values) for window in windows]
    for step in range(2):
        guider.set_state(step=step, num_inference_steps=2, timestep=torch.tensor(0))
        for _ in range(3):
            guider.prepare_models(setup.model)
            with torch.no_grad():
                out = [setup(setup.model, window, values) for window in windows]
            guider.cleanup_models(setup.model)
        for window, truth in zip(out, expected, strict=True):
            assert relative(window, truth) < 1e-5


def test_an_output_that_is_written_into_is_not_taken_over():
    setup = case("sd3")

    def write(module, args, kwargs):
        kwargs["hidden_states"].mul_(1.5)

    block = setup.model.transformer_blocks[3]
    handle = block.register_forward_pre_hook(write, with_kwargs=True)
    result = denoise(setup, guider := PAG(**ALWAYS))
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, _perturbed(setup, 3), active=range(STEPS), **scales)
    handle.remove()
    assert max(_differences(result, expected)) < 1e-5
    assert [m for m in guider._warned if "nothing usable" in m]


def test_another_model_or_other_modules():
    first, second = case("sd3"), case("pixart")
    guider = PAG(**ALWAYS)
    expected = [denoise(setup, guider)[-1] for setup in (first, second)]
    assert torch.equal(denoise(first, guider)[-1], expected[0])
    blocks = first.model.transformer_blocks
    blocks[3] = case("sd3").model.transformer_blocks[3]
    assert torch.equal(denoise(first, guider)[-1], expected[0])
    assert torch.equal(denoise(second, guider)[-1], expected[1])


# ---- configuration and errors ----


@pytest.mark.parametrize(
    "guider",
    [
        PAG(perturbed_guidance_layers=["mid", "blocks.3"], perturbed_guidance_scale=1.5),
        PAG(perturbed_guidance_config=LayerSkipConfig([1, 2], fqn="transformer_blocks")),
        SLG(skip_layer_guidance_layers=[7, 8, 9]),
        SLG(skip_layer_config=[LayerSkipConfig([1], fqn="blocks", skip_ff=False)]),
    ],
)
def test_saved_and_loaded(guider, tmp_path):
    guider.save_pretrained(tmp_path)
    loaded = type(guider).from_pretrained(tmp_path)
    assert isinstance(loaded, (diffusers.PerturbedAttentionGuidance, diffusers.SkipLayerGuidance))
    assert loaded.skip_layer_config == guider.skip_layer_config
    hidden = {"_use_default_values"}
    config, *others = (
        {k: v for k, v in g.config.items() if k not in hidden}
        for g in (guider, loaded, guider.new())
    )
    assert others == [config, config]
    assert json.loads((tmp_path / "guider_config.json").read_text())
    assert "num_conditions" in repr(guider)


def test_a_configuration_is_not_changed():
    config = LayerSkipConfig([3])
    with_config = denoise(case("sd3"), PAG(perturbed_guidance_config=config, **ALWAYS))
    assert config == LayerSkipConfig([3])
    by_index = denoise(case("sd3"), PAG(perturbed_guidance_layers=3, **ALWAYS))
    assert torch.equal(with_config[-1], by_index[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAG(perturbed_guidance_layers=1, perturbed_guidance_config={}), "choose one"),
        (lambda: PAG(perturbed_guidance_config=3), "must be a LayerSkipConfig"),
        (lambda: PAG(perturbed_guidance_layers=[]), "layers is empty"),
        (lambda: PAG(perturbed_guidance_start=0.5, perturbed_guidance_stop=0.1), "start <= stop"),
        (lambda: PAG(backend="cuda"), "choose one of auto, torch, triton"),
        (lambda: SLG(skip_layer_guidance_layers="mid"), "index of a block"),
        (lambda: SLG(skip_layer_guidance_layers=[]), "index of a block"),
        (lambda: SLG(skip_layer_config={"indices": []}), "indices are empty"),
        (lambda: SLG(skip_layer_config={"indices": [1], "dropout": 0.5}), "dropout of 0.5"),
        (
            lambda: SLG(skip_layer_config={"indices": [1], "skip_attention_scores": True}),
            "choose one",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("guider", "name", "message"),
    [
        (PAG(perturbed_guidance_layers="nowhere"), "sd3", "matches none of"),
        (PAG(perturbed_guidance_config={"indices": [9]}), "sd3", "has blocks 0 to 5; got 9"),
        (PAG(perturbed_guidance_config={"indices": [0], "fqn": "blocks"}), "sd3", "no list of"),
        (SLG(), "sd", "no default layers"),
        (SLG(skip_layer_guidance_layers=6), "sd3", "has blocks 0 to 5; got 6"),
    ],
)
def test_layers_that_are_not_there(guider, name, message):
    setup = case(name)
    before = _snapshot(setup.model)
    with pytest.raises(ValueError, match=message):
        denoise(setup, guider)
    assert _snapshot(setup.model) == before


def test_a_model_that_nobody_knows():
    with pytest.raises(ValueError, match="none of the supported denoisers"):
        guider = PAG()
        guider.prepare_models(torch.nn.Linear(1, 1))
