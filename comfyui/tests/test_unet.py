"""UNets: the picture of a whole perturbed pass, for the FLOPs that the layers behind it leave."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from flops import Flops
from patched import compare, costs, holds, pag, seg

# isort: split
from comfyui import nodes

# model, widgets, arguments of the sampling, ControlNets, FLOPs × no PAG that must not be passed
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, float]] = {
    "middle": ("sdxl", {}, {}, 0, 1.34),
    "middle without CFG": ("sdxl", {}, {"cfg": 1.0}, 0, 1.67),
    "output 4": ("sdxl", {"unet_block": "output", "unet_block_id": 4}, {}, 0, 1.07),
    "ControlNet": ("sdxl", {}, {}, 1, 1.20),
    "ControlNet without CFG": ("sdxl", {}, {"cfg": 1.0}, 1, 1.34),
    "two ControlNets": ("sdxl", {}, {}, 2, 1.16),
    "SD 1.5": ("sd15", {}, {"shape": (1, 4, 32, 32)}, 0, 1.34),
}
SMALL = (
    1.345  # of the middle block in SD 1.5 at 16 × 16, where more of a pass is its deepest layers
)


@pytest.mark.parametrize("row", ROWS)
def test_the_same_picture_for_the_flops_behind_the_fork(row: str) -> None:
    name, widgets, options, controls, bound = ROWS[row]
    model = tiny.build(name)
    if controls:
        made = [tiny.controlnet(model, seed) for seed in range(controls)]
        options["positive"], options["negative"] = tiny.controlled(model, *made)
    compared = compare(model, lambda m, **k: pag(m, **widgets, **k), steps=2, **options)
    holds(compared)
    costs(compared, bound)
    if options.get("cfg") == 1.0:
        assert torch.equal(compared.shared, compared.whole)


@pytest.mark.parametrize("name", tiny.UNETS)
def test_unshared_equals_cores_node_and_the_basic_node_shares(name: str) -> None:
    model = tiny.build(name)
    stock = tiny.sample(model, tiny.stock(model.model), steps=2)
    whole = tiny.sample(model, pag(model.model, share=False), steps=2)
    assert torch.equal(stock, whole)
    basic = nodes.PagFastPAG.execute(model.model, 3.0).result[0]
    with Flops() as count:
        shared = tiny.sample(model, basic, steps=2)
    with Flops() as advanced:
        tiny.sample(model, pag(model.model), steps=2)
    assert (shared - stock).abs().max() <= 5e-6 * stock.abs().max()
    assert count.total == advanced.total


def test_controlnets_run_as_often_as_without_pag() -> None:
    model = tiny.build("sd15")
    control = tiny.controlnet(model)
    positive, negative = tiny.controlled(model, control)
    with tiny.counted(control.control_model) as rows:
        tiny.sample(model, pag(model.model), positive, negative, steps=2)
    assert rows == [2, 2]


def test_a_picture_of_a_batch_is_the_picture_alone() -> None:
    model = tiny.build("sd15")
    batch = compare(model, pag, shape=(3, 4, 16, 16), steps=2)
    holds(batch)
    costs(batch, SMALL)
    odd = compare(model, pag, shape=(1, 4, 24, 16), steps=2)
    holds(odd)


@pytest.mark.parametrize(
    "blocks, bound",
    [("m0,u0,d2.0", 1.5), ("u2", 1.27), ("d0", 1.5), ("u0-8", SMALL)],
)
def test_lists_of_blocks_fork_at_the_first(blocks: str, bound: float) -> None:
    model = tiny.build("sd15")
    compared = compare(model, lambda m, **k: pag(m, unet_block_list=blocks, **k), steps=2)
    holds(compared)
    costs(compared, bound)


def test_one_transformer_block_of_a_layer() -> None:
    model = tiny.build("sdxl")
    one = compare(model, lambda m, **k: pag(m, unet_block_list="u0.4", **k), steps=1)
    all_of_it = compare(model, lambda m, **k: pag(m, unet_block_list="u0", **k), steps=1)
    holds(one)
    holds(all_of_it)
    assert not torch.allclose(one.shared, all_of_it.shared, rtol=1e-3)


@pytest.mark.parametrize("sigma", [-1.0, 0.0, 0.7, 3.0])
def test_blurred_queries_resume_too(sigma: float) -> None:
    model = tiny.build("sd15")
    compared = compare(model, lambda m, **k: seg(m, blur_sigma=sigma, **k), steps=2)
    assert compared.error <= 5e-6
    costs(compared, SMALL)
    # not blurred at all is attention as ever
    assert (compared.effect > 1e-4) == (sigma != 0.0)


@pytest.mark.parametrize(
    "widgets",
    [
        {"rescale": 0.7},
        {"rescale": 0.7, "rescale_mode": "partial"},
        {"rescale_mode": "snf"},
        {"adaptive_scale": 0.2},
    ],
    ids=str,
)
def test_combinations_share_and_differ_from_plain_guidance(widgets: dict[str, Any]) -> None:
    model = tiny.build("sd15")
    compared = compare(model, lambda m, **k: pag(m, **widgets, **k), steps=2)
    holds(compared)
    plain = tiny.sample(model, pag(model.model), steps=2)
    assert (plain - compared.shared).abs().max() > 1e-6 * plain.abs().max()


def test_only_snf_computes_uncond_without_cfg() -> None:
    model = tiny.build("sd15")
    for mode, rows in (("full", 1), ("snf", 2)):
        with tiny.counted(model.model.model.diffusion_model) as seen:
            tiny.sample(model, pag(model.model, rescale_mode=mode), cfg=1.0, steps=1)
        assert seen == [rows, 1]
