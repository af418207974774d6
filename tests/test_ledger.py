"""The FLOP ledger: integers from shapes, against targets and lower bounds.

SD 1.5 is counted here at full size, the other published models in their widths with few layers;
what they cost in full is in ``benchmarks/counts.json``, which ``make counts`` counts anew.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import older
import pytest
import tiny_hosts
import torch
from shallow_cards import shallow_card
from tiny import PIPELINES, build

from pag_fast.analysis.flops import controlnet_cost, count, step_costs
from pag_fast.analysis.ledger import entries
from pag_fast.analysis.lower_bound import trace
from pag_fast.analysis.published import CARDS, find_card, meta_model, meta_twin
from pag_fast.models.inputs import Size, forward_kwargs
from pag_fast.models.layer_names import resolve
from pag_fast.pipelines.registry import HOSTS

ROOT = Path(__file__).parent.parent
COUNTS = json.loads((ROOT / "benchmarks" / "counts.json").read_text("utf-8"))
COUNTED, VERSIONS = COUNTS["flops"], COUNTS["versions"]

# TFLOPs of one row in one step, from the models' publications and earlier counts
ROW = {
    "StableDiffusionPAGPipeline": 0.803,
    "StableDiffusionXLPAGPipeline": 6.761,
    "KolorsPAGPipeline": 6.963,
    "AnimateDiffPAGPipeline": 17.75,
    "StableDiffusion3PAGPipeline": 8.904,
    "HunyuanDiTPAGPipeline": 14.37,
    "PixArtSigmaPAGPipeline": 6.634,
    "SanaPAGPipeline": 2.967,
}

# billions of parameters, as published: a card with a wrong number would not have them
PARAMETERS = {
    "FluxPipeline": 11.9,
    "QwenImagePipeline": 20.4,
    "WanPipeline": 14.3,
    "WanPipeline-1.3B": 1.42,
    "LTXPipeline": 1.92,
    "CogVideoXPipeline": 5.57,
    "CogVideoXPipeline-2b": 1.69,
    "HunyuanVideoPipeline": 12.8,
    "Lumina2Pipeline": 2.61,
    "ChromaPipeline": 8.90,
    "CogView4Pipeline": 6.37,
    "Flux2Pipeline": 32.2,
    "Flux2KleinPipeline": 3.88,
    "Flux2KleinPipeline-9B": 9.08,
    "ZImagePipeline": 6.15,
    "Krea2Pipeline": 12.8,
    "HiDreamImagePipeline": 17.1,
    "HunyuanVideo15Pipeline": 8.33,
    "WanVACEPipeline": 17.3,
    "WanVACEPipeline-1.3B": 2.15,
}

# at least this many times fewer FLOPs than stock: pipeline, CFG, factor
TARGETS = {
    ("StableDiffusionXLPAGPipeline", True): 1.118,
    ("StableDiffusionXLPAGPipeline", False): 1.185,
    ("StableDiffusionPAGPipeline", True): 1.135,
    ("AnimateDiffPAGPipeline", True): 1.12,
    ("StableDiffusionXLControlNetPAGPipeline", True): 1.21,
    ("StableDiffusion3PAGPipeline", True): 1.215,
    ("PixArtSigmaPAGPipeline", True): 1.19,
    ("HunyuanDiTPAGPipeline", True): 1.14,
    ("SanaPAGPipeline", True): 1.145,
}


@functools.cache
def _full_size():
    return entries("StableDiffusionPAGPipeline")


@pytest.mark.parametrize("name", ROW)
def test_row(name):
    """A row of the committed counts; the bound's trace has the FLOPs of a row, and no others."""
    label = f"{name} {','.join(CARDS[name].documented_layers)}, CFG off"
    assert COUNTED[label]["stock"] / 2 / 1e12 == pytest.approx(ROW[name], rel=0.01)
    card = shallow_card(name)
    model = meta_model(card)
    flops = count(model, card.size.inputs(model)(1))
    assert sum(item.flops for item in trace(model, card.size.inputs(model))) == flops


def test_row_at_full_size():
    card = CARDS["StableDiffusionPAGPipeline"]
    model = meta_model(card)
    flops = count(model, card.size.inputs(model)(1))
    assert flops / 1e12 == pytest.approx(ROW[card.pipeline], rel=0.01)
    assert sum(item.flops for item in trace(model, card.size.inputs(model))) == flops


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = meta_model(CARDS[name])
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("cfg", [True, False])
def test_targets_and_within_one_percent_of_the_bound(cfg):
    """SD 1.5 at full size, as it is in the committed counts."""
    made = _full_size()[0 if cfg else 1]
    cost = made.cost
    assert 1.0 <= cost.patched / cost.bound <= 1.01
    assert cost.speedup >= TARGETS.get((made.pipeline, cfg), 1.0)
    if VERSIONS["diffusers"] == diffusers.__version__:
        expected = {"stock": cost.stock, "patched": cost.patched, "bound": cost.bound}
        assert COUNTED[made.label] == expected


def test_committed_counts_are_within_one_percent_of_the_bound():
    """`make counts` counts them all anew, at full depth."""
    assert {label.split()[0] for label in COUNTED} == set(CARDS)
    for label, cost in COUNTED.items():
        assert 1.0 <= cost["patched"] / cost["bound"] <= 1.01, label
        wanted = TARGETS.get((label.split()[0], not label.endswith("CFG off")), 1.0)
        assert cost["stock"] / cost["patched"] >= wanted, label


_LAYERS = [
    # CFG on; nearly nothing is left after the last fork without it
    ("StableDiffusionPAGPipeline", "down_blocks.0.attentions.0", [True]),
    ("StableDiffusionPAGPipeline", "up_blocks.1.attentions.1", [True]),
    ("StableDiffusionXLPAGPipeline", "mid_block.attentions.0.transformer_blocks.1", [True]),
    ("StableDiffusionXLPAGPipeline", "up_blocks.0.attentions.1.transformer_blocks.1", [True]),
    ("AnimateDiffPAGPipeline", "up_blocks.1.motion_modules.1", [True]),
    ("StableDiffusion3PAGPipeline", "blocks.1", [True]),
    ("HunyuanDiTPAGPipeline", "blocks.5", [True]),
    ("PixArtSigmaPAGPipeline", r"blocks\.0\.", [True]),
    ("SanaPAGPipeline", "transformer_blocks.0", [True]),
    # CFG on and off
    ("StableDiffusionControlNetPAGPipeline", "mid", [True, False]),
    ("StableDiffusionXLPAGPipeline", "mid", [True, False]),
    ("AnimateDiffPAGPipeline", "mid_block.*attn1", [True, False]),
    ("StableDiffusion3PAGPipeline", "blocks.2", [True, False]),
    ("HunyuanDiTPAGPipeline", "blocks.2", [True, False]),
    ("PixArtSigmaPAGPipeline", r"blocks\.2\.", [True, False]),
    ("SanaPAGPipeline", "transformer_blocks.2", [True, False]),
    ("FluxPipeline", r"^transformer_blocks\.1\.", [True, False]),
    ("FluxPipeline", r"single_transformer_blocks\.[12]\.", [True, False]),
    ("QwenImagePipeline", "blocks.[03]", [True, False]),
    ("WanPipeline", "blocks.2", [True, False]),
    ("LTXPipeline", "blocks.0", [True, False]),
    ("LTXPipeline", "blocks.4", [True, False]),
    ("CogVideoXPipeline", "blocks.[24]", [True, False]),
    ("HunyuanVideoPipeline", r"^transformer_blocks\.1\.", [True, False]),
    ("HunyuanVideoPipeline", r"single_transformer_blocks\.1\.", [True, False]),
    ("Lumina2Pipeline", r"layers\.[13]", [True, False]),
    ("CogView4Pipeline", r"blocks\.1\.", [True, False]),
    ("Flux2KleinPipeline", r"^transformer_blocks\.1\.", [False]),
    ("Flux2KleinPipeline", r"single_transformer_blocks\.[12]\.", [True, False]),
    ("ZImagePipeline", r"^layers\.1\.", [True, False]),
    ("Krea2Pipeline", r"blocks\.1\.", [False]),
    ("HiDreamImagePipeline", r"^double_stream_blocks\.1\.", [True, False]),
    ("HiDreamImagePipeline", r"^single_stream_blocks\.1\.", [True, False]),
    ("WanVACEPipeline", r"^blocks\.1\.", [False]),
    ("HunyuanVideo15Pipeline", r"blocks\.1\.", [False]),
]
HOSTED = [name for name, spec in tiny_hosts.HOSTS.items() if spec.brings_a_model]


@pytest.mark.parametrize(
    ("name", "layer", "cfg"), _LAYERS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_within_one_percent_of_the_bound_elsewhere(name, layer, cfg):
    """Forks in down, mid and up blocks, late in a transformer, first and last, several."""
    card = shallow_card(name)
    model = meta_model(card)
    inputs = card.size.inputs(model)
    costs = step_costs(model, [layer], inputs, cfg=cfg, sequential=card.sequential)
    if card.controlnet is not None:
        net = meta_model(card, "controlnet")
        inputs = card.size.inputs(net)
        costs = [a + controlnet_cost(net, inputs, cfg=b) for a, b in zip(costs, cfg, strict=True)]
    for cost in costs:
        assert 1.0 <= cost.patched / cost.bound <= 1.01
        assert cost.speedup > 1.0


@pytest.mark.parametrize("name", PIPELINES)
def test_every_card_takes_its_inputs(name):
    card = shallow_card(name)
    for which in ("denoiser", "controlnet") if card.controlnet else ("denoiser",):
        model = meta_model(card, which)
        with torch.no_grad():
            model(**card.size.inputs(model)(2), return_dict=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_inputs_follow_from_any_config(name):
    """For a user's own checkpoint: shapes come from the configuration alone."""
    model = getattr(build(name), PIPELINES[name].denoiser)
    size = {"height": 32, "width": 32, "vae_scale_factor": 2, "frames": 2}
    kwargs = forward_kwargs(model, rows=2, **size)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            kwargs[key] = torch.zeros_like(value)
    if "added_cond_kwargs" in kwargs and kwargs["added_cond_kwargs"].get("time_ids") is not None:
        kwargs["added_cond_kwargs"] = {
            k: torch.zeros_like(v) for k, v in kwargs["added_cond_kwargs"].items()
        }
    with torch.no_grad():
        out = model(**kwargs, return_dict=False)[0]
    assert out.shape[0] == 2


@older.newest("cards are of newer models, too")
def test_pipelines_without_pag_have_a_card():
    models = {}
    for name in HOSTS:
        card = find_card(name)
        assert card.pipeline == name
        assert card.documented_layers == HOSTS[name].layers
        models[card.denoiser, card.documented_layers] = card
    for card in models.values():
        assert resolve(meta_model(card), card.documented_layers)
    assert find_card("StableDiffusionXLInpaintPipeline").config["in_channels"] == 9
    assert find_card("FluxInpaintPipeline").config == find_card("FluxPipeline").config


@pytest.mark.parametrize("name", HOSTED)
def test_inputs_of_hosts_follow_from_any_config(name):
    """Real tensors of these shapes go through the model, and so do masks without values."""
    longer = {"axes_lens": (300, 128, 128)} if name == "Lumina2Pipeline" else {}
    pipe = tiny_hosts.build(name, **longer)
    size = replace(Size.of(pipe), height=32, width=32)
    size = size if size.frames == 1 else size.but(frames=5)
    kwargs = size.inputs(pipe.transformer)(2)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and "mask" not in key:
            kwargs[key] = torch.zeros_like(value)
    for key in [key for key in kwargs if "mask" in key]:
        kwargs[key] = torch.ones_like(kwargs[key])
    sample = _stacked(next(iter(kwargs.values())))
    with torch.no_grad():
        out = _stacked(pipe.transformer(**kwargs, return_dict=False)[0])
    # as far as the pipeline's own call goes
    shapes = [list(x.shape[:-1]) for x in (out, sample)]
    if name == "HunyuanVideo15Pipeline":  # it is given the picture's latents, too
        shapes = [shape[:1] + shape[2:] for shape in shapes]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        twin = meta_twin(pipe.transformer)
        shape = _stacked(twin(**size.inputs(twin)(2), return_dict=False)[0]).shape
    assert shape == out.shape


def _stacked(rows):
    return torch.stack(rows) if isinstance(rows, list) else rows


def test_the_pages_say_what_is_counted():
    """Of pipelines without PAG: the committed counts, which `make counts` checks."""
    readme = (ROOT / "README.md").read_text("utf-8")
    sd3 = COUNTED["StableDiffusion3PAGPipeline blocks.13"]
    assert f"**{sd3['stock'] / sd3['patched']:.2f} ×** fewer FLOPs" in readme
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    for name in PARAMETERS:
        label = f"{name} {','.join(CARDS[name].documented_layers)}"
        off = COUNTED[f"{label}, CFG off"]
        on, times = COUNTED.get(label), 2 * off["patched"] / off["stock"]
        if on is None:  # there is no CFG
            cells = f"| {off['patched'] / 1e12:.2f} | | {times:.2f} × |"
        else:
            factor = 1.5 * on["patched"] / on["stock"]
            cells = f"| {on['patched'] / 1e12:.2f} | **{factor:.2f} ×** | {times:.2f} × |"
        model = CARDS[name].checkpoint.removesuffix(" 0.9").replace(" T2V", "")
        assert re.search(rf"^\| {model}, .* {re.escape(cells)}$", page, re.MULTILINE), name


# rows of the page, of pipelines with PAG
STOCK = {
    "Stable Diffusion 1.5": "StableDiffusionPAGPipeline",
    "SD 1.5 + ControlNet": "StableDiffusionControlNetPAGPipeline",
    "SDXL": "StableDiffusionXLPAGPipeline",
    "SDXL + ControlNet": "StableDiffusionXLControlNetPAGPipeline",
    "Kolors": "KolorsPAGPipeline",
    "AnimateDiff, 16 frames": "AnimateDiffPAGPipeline",
    "Stable Diffusion 3": "StableDiffusion3PAGPipeline",
    "HunyuanDiT": "HunyuanDiTPAGPipeline",
    "PixArt-Σ": "PixArtSigmaPAGPipeline",
    "Sana": "SanaPAGPipeline",
}


@pytest.mark.parametrize("title", STOCK)
def test_the_page_says_what_stock_pag_is_counted_to_take(title):
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    layers = ",".join(CARDS[STOCK[title]].documented_layers)
    on, off = (COUNTED[f"{STOCK[title]} {layers}{tail}"] for tail in ("", ", CFG off"))
    numbers = " | ".join(f"{on[name] / 1e12:.2f}" for name in ("stock", "patched", "bound"))
    times = [made["stock"] / made["patched"] for made in (on, off)]
    row = f"| {title} | `{layers}` | {numbers} | **{times[0]:.2f} ×** | {times[1]:.2f} × |"
    assert row in page.splitlines()
