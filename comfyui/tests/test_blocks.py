"""Names of blocks, defaults, and what the nodes refuse when they are executed."""

from __future__ import annotations

import pytest
import tiny
from patched import dit, pag, seg

# isort: split
from comfyui import nodes
from comfyui.blocks import (
    dit_lists,
    parse_dit_blocks,
    parse_unet_blocks,
    replaced_keys,
    unet_blocks,
)
from comfyui.defaults import PUBLISHED, default_blocks


def _net(name: str):
    return tiny.build(name).model.model.diffusion_model


def test_blocks_with_self_attention_are_found() -> None:
    found = unet_blocks(_net("sdxl"))
    assert [number for kind, number in found if kind == "input"] == [4, 5, 7, 8]
    assert found["middle", 0] == 10
    assert [number for kind, number in found if kind == "output"] == [0, 1, 2, 3, 4, 5]


def test_lists_are_read_as_sd_perturbed_attention_reads_them() -> None:
    net = _net("sdxl")
    assert parse_unet_blocks(net, "m0") == {("middle", 0, None)}
    assert parse_unet_blocks(net, "d2.2-4, u0.4") == {
        ("input", 7, 2), ("input", 7, 3), ("input", 7, 4), ("output", 0, 4)
    }  # fmt: skip
    assert parse_unet_blocks(net, "d0-1,m0.9") == {
        ("input", 4, None), ("input", 5, None), ("middle", 0, 9)
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("x1", "'x1' is no block"),
        ("m0,", "'' is no block"),
        ("d-1", "'d-1' is no block"),
        ("d9", "this model has d0 to d3"),
        ("m1", "this model has m0 alone"),
        ("m0.10", "m0 has m0.0 to m0.9"),
        ("u4-2", "spans run upwards. Write 2-4, not 4-2"),
        ("m0,u0.3-1", "'u0.3-1' names no block"),
    ],
)
def test_lists_that_name_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pag(tiny.build("sdxl").model, unet_block_list=text)


def test_the_two_widgets_name_blocks_that_exist() -> None:
    model = tiny.build("sdxl").model
    with pytest.raises(ValueError, match="input blocks 4, 5, 7, 8"):
        pag(model, unet_block="input", unet_block_id=0)
    with pytest.raises(ValueError, match="middle blocks 0"):
        seg(model, unet_block_id=1)


def test_a_replacement_of_one_block_does_not_win_over_ours() -> None:
    keys = replaced_keys(_net("sd15"), frozenset({("middle", 0, None), ("output", 3, 0)}))
    assert keys == [("middle", 0), ("middle", 0, 0), ("output", 3, 0)]


@pytest.mark.parametrize("name", tiny.DITS)
def test_unet_nodes_name_the_node_for_transformers(name: str) -> None:
    model = tiny.build(name).model
    for execute in (
        lambda: nodes.PagFastPAG.execute(model, 3.0),
        lambda: pag(model),
        lambda: seg(model),
    ):
        with pytest.raises(ValueError, match=r"use PAG Fast \(DiT\)"):
            execute()
    dit(model)


@pytest.mark.parametrize("name", tiny.DITS)
def test_defaults_exist_and_move_with_depth(name: str) -> None:
    net = _net(name)
    ((kind, number, inner),) = default_blocks(net)
    assert inner is None
    assert 0 <= number < len(dit_lists(net)[kind])
    published = PUBLISHED.get(type(net).__name__)
    if published:
        depth = len(dit_lists(net)[kind])
        assert kind == published[0]
        assert abs(number / depth - published[2] / published[1]) < 1 / depth


def test_lists_of_transformer_blocks() -> None:
    net = _net("flux")
    assert parse_dit_blocks(net, "0-1", " 1 ") == {
        ("double", 0, None), ("double", 1, None), ("single", 1, None)
    }  # fmt: skip
    assert parse_dit_blocks(net, "", " ") == frozenset()
    with pytest.raises(ValueError, match="'1-0' names no block"):
        parse_dit_blocks(net, "", "1-0")


@pytest.mark.parametrize("node", nodes.GUIDANCE)
def test_every_input_is_explained(node) -> None:
    schema = node.define_schema()
    assert schema.category == "model/patch/unet"
    assert schema.description
    assert "PAG" in schema.search_aliases
    for entry in schema.inputs:
        assert entry.id == "model" or entry.tooltip, entry.id
