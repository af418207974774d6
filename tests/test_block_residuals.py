"""ControlNets of transformers: their residuals go between blocks, some in front of the fork."""

from __future__ import annotations

import contextlib
import functools

import diffusers
import older
import pytest
import torch
from numerics import observing, relative
from shallow_cards import shallow_card
from tiny_hosts import build, call_kwargs, controlnets, latents, slow_pag
from torch.utils.flop_counter import FlopCounterMode

import pag_fast
from pag_fast.analysis.flops import controlnet_cost, step_costs
from pag_fast.analysis.published import meta_model
from pag_fast.models.layer_names import resolve
from pag_fast.runtime.row_decision import align_residuals
from pag_fast.sharing.arguments import BLOCK_RESIDUALS
from pag_fast.sharing.layout import by_intervals, by_proportion

SD3, HUNYUAN = "StableDiffusion3ControlNetPipeline", "HunyuanDiTControlNetPipeline"
FLUX, QWEN = "FluxControlNetPipeline", "QwenImageControlNetPipeline"
SANA = "SanaControlNetPipeline"
# forks behind every residual, in front of all, and between two blocks that share one
FORKS = [
    (SD3, r"blocks\.0\."),
    (SD3, r"blocks\.4\."),
    (SD3, r"blocks\.5\."),
    (HUNYUAN, r"blocks\.1\."),
    (HUNYUAN, r"blocks\.5\."),
    (FLUX, r"^transformer_blocks\.2\."),
    (FLUX, r"single_transformer_blocks\.0\."),
    (FLUX, r"single_transformer_blocks\.2\."),
    (QWEN, r"blocks\.0\."),
    (QWEN, r"blocks\.3\."),
    (SANA, r"blocks\.4\."),
]


@functools.lru_cache(maxsize=2)
def _pipe(name):
    return build(name)


def _agrees(pipe, name, layers, **call):
    """Patched like separate forwards with dense masks, and everything shared that can be."""
    cfg = call.get("cfg", True)

    def kwargs():
        return call_kwargs(name, pipe, **call)

    attentions = list(resolve(pipe.transformer, layers).values())
    scale = 5.0 if cfg else 1.0
    with slow_pag(pipe, name, attentions, 3.0, scale):
        truth = latents(pipe, kwargs())
    without = latents(pipe, kwargs())
    with pag_fast.patched(pipe, layers, pag_scale=3.0):
        patched = latents(pipe, kwargs())
        assert dict(pipe._pag_fast.steps) == {"shared": 2} and not pipe._pag_fast.fallbacks
    assert relative(truth, without) > 1e-4, "PAG makes no difference here"
    assert relative(patched, truth) < 1e-5


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize(("name", "layer"), FORKS)
def test_wherever_the_fork_is(name, layer, cfg):
    _agrees(_pipe(name), name, [layer], cfg=cfg, batch=2)


@pytest.mark.parametrize(
    ("name", "nets"),
    [
        (FLUX, {"num_layers": 0, "num_single_layers": 3}),
        (FLUX, {"num_layers": 3, "num_single_layers": 0}),
        (FLUX, {"num_layers": 1, "num_single_layers": 1}),
        (FLUX, {"num_layers": 5, "num_single_layers": 4}),
        (SD3, {"num_layers": 1}),
        (SD3, {"num_layers": 4}),
        (SD3, {"num_layers": 6}),
        (QWEN, {"num_layers": 1}),
        (QWEN, {"num_layers": 4}),
    ],
)
def test_any_number_of_residuals(name, nets):
    make = {FLUX: controlnets.flux_net, SD3: controlnets.sd3_net, QWEN: controlnets.qwen_net}[name]
    pipe = build(name)
    pipe.register_modules(controlnet=make(**nets))
    _agrees(pipe, name, [r"blocks\.2\."])


@older.newest("Flux is guided by negative prompts in words")
def test_residuals_that_are_repeated():
    """XLabs' nets see pixels, and their residuals begin anew when all are used."""
    pipe = build(FLUX)
    own = {"conditioning_embedding_channels": 16, "patch_size": 2, "num_single_layers": 0}
    pipe.register_modules(controlnet=controlnets.flux_net(**own))
    embedding = diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding
    hint = embedding(conditioning_embedding_channels=4, block_out_channels=(4, 4))
    pipe.controlnet.input_hint_block = torch.nn.Sequential(hint)
    for parameter in pipe.controlnet.input_hint_block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        observing(lambda _, args, kwargs: seen.append(kwargs["controlnet_blocks_repeat"])),
        with_kwargs=True,
    )
    _agrees(pipe, FLUX, [r"^transformer_blocks\.2\.", r"single_transformer_blocks\.1\."])
    handle.remove()
    assert all(seen) and seen


@pytest.mark.parametrize(
    ("name", "cls", "make", "several"),
    [
        (SD3, "SD3MultiControlNetModel", controlnets.sd3_net, 2),
        (HUNYUAN, "HunyuanDiT2DMultiControlNetModel", controlnets.hunyuan_net, 2),
        (FLUX, "FluxMultiControlNetModel", controlnets.flux_net, 2),
        (QWEN, "QwenImageMultiControlNetModel", controlnets.qwen_net, 1),
    ],
)
def test_several_nets(name, cls, make, several):
    """And one net that is run for each of several pictures, from which nothing can be kept."""
    pipe = build(name)
    pipe.register_modules(controlnet=getattr(diffusers, cls)([make() for _ in range(several)]))
    picture = call_kwargs(name, pipe)["control_image"]
    _agrees(
        pipe,
        name,
        [r"blocks\.2\."],
        control_image=[picture, picture.flip(-1)],
        controlnet_conditioning_scale=[0.7, 0.5],
    )


def test_blocks_that_are_skipped():
    """The residual behind a skipped block is added on the perturbed branch, too."""
    pipe = _pipe(SD3)
    kwargs = functools.partial(call_kwargs, SD3, pipe, batch=2)
    options = {"perturbation": "skip", "pag_scale": 3.0}
    with pag_fast.patched(pipe, ["blocks.3", "blocks.4"], **options):
        shared = latents(pipe, kwargs())
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
    with pag_fast.patched(pipe, ["blocks.3", "blocks.4"], share_branches=False, **options):
        apart = latents(pipe, kwargs())
        assert not pipe._pag_fast.fallbacks
    assert relative(shared, apart) < 1e-5
    assert relative(apart, latents(pipe, kwargs())) > 1e-3


@pytest.mark.parametrize("name", [SD3, HUNYUAN, FLUX, QWEN])
def test_the_net_never_runs_the_perturbed_rows_and_nothing_is_left(name, snapshot):
    pipe, rows = build(name), []
    stock = latents(pipe, call_kwargs(name, pipe))
    before = snapshot(pipe)
    pag_fast.patch(pipe, [r"blocks\.2\."], pag_scale=3.0)
    watched = pipe.controlnet.controlnet_blocks[0]
    handle = watched.register_forward_hook(observing(lambda _, args, out: rows.append(len(out))))
    guided = latents(pipe, call_kwargs(name, pipe))
    assert rows == [1 if name in (FLUX, QWEN) else 2] * 2
    handle.remove()
    handle = pipe.transformer.register_forward_hook(observing(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        latents(pipe, call_kwargs(name, pipe))
    handle.remove()
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), guided)
    assert relative(guided, stock) > 1e-4
    assert torch.equal(latents(pipe, call_kwargs(name, pipe, pag_scale=0.0)), stock)
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


def test_what_sees_the_control_image_alone_is_computed_once():
    pipe, calls = build(FLUX), []
    weight = pipe.controlnet.controlnet_x_embedder.weight

    @pag_fast.runtime.compatibility.row_wise
    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear and args[1] is weight:
                calls.append(1)
            return func(*args, **(kwargs or {}))

    with pag_fast.patched(pipe, [r"^transformer_blocks\.2\."]), Products():
        latents(pipe, call_kwargs(FLUX, pipe, steps=4))
    # three steps compute one of the three kept modules again, in turn
    assert len(calls) == 2


def _work(name, layers, cfg):
    """FLOPs of the denoiser and of the ControlNet in a step, patched and stock."""
    pipe, found = build(name), []
    for scale in (3.0, 0.0):
        counted = dict.fromkeys(("transformer", "controlnet"), 0)
        with contextlib.ExitStack() as hooks:
            for part in counted:
                if getattr(pipe, part, None) is not None:
                    _count(getattr(pipe, part), part, counted, hooks)
            with pag_fast.patched(pipe, layers, pag_scale=scale, cache_conditioning=False):
                latents(pipe, call_kwargs(name, pipe, steps=1, cfg=cfg))
        found.append(counted)
    return found


def _count(model, part, counted, hooks):
    counter = FlopCounterMode(display=False)

    def before(*_):
        counter.__enter__()

    def after(*_):
        counter.__exit__(None, None, None)
        counted[part] += counter.get_total_flops()

    hooks.callback(model.register_forward_pre_hook(observing(before)).remove)
    hooks.callback(model.register_forward_hook(observing(after)).remove)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", [SD3, HUNYUAN, FLUX, QWEN])
def test_a_controlnet_adds_its_own_work_and_nothing_else(name, cfg):
    layers = [r"single_transformer_blocks\.1\." if name == FLUX else r"blocks\.3\."]
    (guided, stock), (alone, _) = (
        _work(pipeline, layers, cfg) for pipeline in (name, name.replace("ControlNet", ""))
    )
    assert guided["transformer"] == alone["transformer"] > stock["transformer"]
    assert 0 < guided["controlnet"] <= stock["controlnet"]


_CARDS = {
    "FluxPipeline": ("FluxControlNetModel", [r"single_transformer_blocks\.1\."]),
    "StableDiffusion3PAGPipeline": ("SD3ControlNetModel", [r"blocks\.2\."]),
    "QwenImagePipeline": ("QwenImageControlNetModel", [r"blocks\.4\."]),
    "HunyuanDiTPAGPipeline": ("HunyuanDiT2DControlNetModel", [r"blocks\.4\."]),
    "SanaPAGPipeline": ("SanaControlNetModel", [r"blocks\.2\."]),
}


@pytest.mark.parametrize("name", _CARDS)
def test_within_one_percent_of_the_bound(name):
    """Published widths with few blocks, for which what is computed in vain weighs more."""
    card, (cls, layers) = shallow_card(name), _CARDS[name]
    model = meta_model(card)
    with torch.device("meta"):
        net = controlnets.net(getattr(diffusers, cls), model).to(torch.float16)
    costs = step_costs(model, layers, card.size.inputs(model), sequential=card.sequential)
    for cfg, cost in zip((True, False), costs, strict=True):
        both = cfg and not card.sequential
        cost = cost + controlnet_cost(net, card.size.inputs(net), cfg=both)
        assert 1.0 <= cost.patched / cost.bound <= 1.01
        assert cost.speedup > 1.0


@pytest.mark.parametrize("name", [SD3, HUNYUAN, FLUX, QWEN, SANA])
def test_explain_counts_the_net(name):
    pipe = pag_fast.patch(_pipe(name), [r"blocks\.2\."])
    kwargs = call_kwargs(name, pipe)
    found = pag_fast.explain(pipe, height=kwargs["height"], width=kwargs["width"])
    assert not found.notes
    for predicted in found.flops:
        assert predicted.bound <= predicted.patched < predicted.stock
    rows = {call.cfg: call.patched for call in found.calls if "ControlNet" in call.model}
    assert rows == {True: "1" if name in (FLUX, QWEN) else "2", False: "1"}
    pag_fast.unpatch(pipe)


# ---- which residual goes where ----


def test_spreads_are_those_of_the_models():
    for blocks in range(1, 25):
        for residuals in range(1, 30):
            interval = int(-(-blocks // residuals))
            assert by_intervals(residuals, blocks, {}) == [i // interval for i in range(blocks)]
            share = blocks / residuals
            assert by_proportion(residuals, blocks, {}) == [int(i / share) for i in range(blocks)]
            assert max(by_proportion(residuals, blocks, {})) < residuals
    assert by_intervals(2, 5, {"controlnet_blocks_repeat": True}) == [0, 1, 0, 1, 0]


def test_residuals_that_nobody_has_described_run_unshared():
    pipe = _pipe(SD3)
    assert "controlnet_states" in BLOCK_RESIDUALS
    with pag_fast.patched(pipe, [r"blocks\.3\."]):
        latents(pipe, call_kwargs(SD3, pipe))
        installed = next(iter(pipe._pag_fast._installed.values()))[1]
        installed.plan.block_residuals = ()
        latents(pipe, call_kwargs(SD3, pipe))
        assert pipe._pag_fast.steps["not shared"] == 2
        assert "residuals of a ControlNet go between the blocks" in str(pipe._pag_fast.fallbacks)


def test_a_row_for_all_pictures_is_left_to_the_model():
    pipe = _pipe(SD3)
    with pag_fast.patched(pipe, [r"blocks\.3\."]):
        latents(pipe, call_kwargs(SD3, pipe))
        installed = next(iter(pipe._pag_fast._installed.values()))[1]
        one = torch.randn(1, 16, 16)
        call = {"block_controlnet_hidden_states": [one, one]}
        installed.state.slabs = (2, 2, 3)
        align_residuals(call, 3, 2, 1, installed.state, installed.plan)
        installed.state.slabs = None
    assert all(x is one for x in call["block_controlnet_hidden_states"])
