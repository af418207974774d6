"""Transformers: the same picture, perturbed as pag_fast and diffusers perturb joint attention."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from flops import Flops
from patched import compare, dit, holds

# isort: split
from comfyui.blocks import dit_lists
from comfyui.sharing import joint
from comfyui.sharing.dit import COMPARED

SHARED = [name for name in tiny.DITS if name not in ("lumina2", "z_image")]


def _blocks(name: str) -> dict[str, str]:
    """The block in the middle of the way."""
    lists = dit_lists(tiny.build(name).model.model.diffusion_model)
    if "single" in lists:
        return {"single_blocks": "0"}
    return {"double_blocks": str(len(lists["double"]) // 2)}


@pytest.mark.parametrize("perturbation", ["identity", "skip"])
@pytest.mark.parametrize("name", SHARED)
def test_the_same_picture_for_the_flops_behind_the_fork(name: str, perturbation: str) -> None:
    model, blocks = tiny.build(name), _blocks(name)
    widgets = {**blocks, "perturbation": perturbation}
    compared = compare(model, lambda m, **k: dit(m, **widgets, **k), steps=2)
    holds(compared)
    assert type(model.model.model.diffusion_model).__name__ in COMPARED
    # what lies in front of the fork costs nothing: its share of a pass is left out
    saved = compared.ratios[0] - compared.ratios[1]
    assert saved >= 0.48 * _share_in_front(model, blocks), compared.ratios


def _share_in_front(model: tiny.Tiny, blocks: dict[str, str]) -> float:
    """The share of a forward's FLOPs that lies in the blocks in front of the fork."""
    lists = dit_lists(model.model.model.diffusion_model)
    ((kind, number),) = blocks.items()
    front = list(lists["double"])
    if kind == "double_blocks":
        front = front[: int(number)]
    inside = Flops()
    handles = []
    for block in front:
        handles += [
            block.register_forward_pre_hook(lambda *_: inside.__enter__() and None),
            block.register_forward_hook(lambda *_: inside.__exit__(None, None, None)),
        ]
    try:
        with Flops() as whole:
            tiny.sample(model, steps=1, cfg=1.0)
    finally:
        for handle in handles:
            handle.remove()
    return inside.total / (whole.total or 1)


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_transformers_without_patches_are_perturbed_whole(name: str) -> None:
    model = tiny.build(name)
    compared = compare(model, dit, steps=2)
    holds(compared)
    assert torch.equal(compared.shared, compared.whole)
    net = model.model.model.diffusion_model
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match="does not let its blocks be left out"):
        tiny.sample(model, dit(model.model, perturbation="skip"), steps=1)


def test_an_unknown_transformer_is_compared_once_and_trusted(monkeypatch: Any) -> None:
    from comfyui import passes
    from comfyui.sharing import dit as plans

    model = tiny.build("wan")
    known = tiny.sample(model, dit(model.model, double_blocks="2"), steps=3)
    for module in (plans, passes):
        monkeypatch.setattr(module, "COMPARED", frozenset())
    with tiny.counted(model.model.model.diffusion_model) as rows:
        seen = tiny.sample(model, dit(model.model, double_blocks="2"), steps=3)
    # the image tokens are looked for, and the first resumed pass is computed again as a whole
    assert rows == [2, 1, 1, 1, 2, 1, 2, 1]
    assert (seen - known).abs().max() <= 5e-6 * known.abs().max()


def test_a_transformer_that_does_not_resume_the_same_is_computed_whole(
    monkeypatch: Any, caplog: Any
) -> None:
    from comfyui import passes
    from comfyui.sharing import dit as plans

    model = tiny.build("wan")
    whole = tiny.sample(model, dit(model.model, double_blocks="2", share=False), steps=2)
    for module in (plans, passes):
        monkeypatch.setattr(module, "COMPARED", frozenset())
    kept = plans.DiTPlan.record

    def spoil(self: Any, net: Any, entries: Any, options: Any) -> Any:
        to = kept(self, net, entries, options)
        key = self.shared(net)[-1]
        inner = to["patches_replace"]["dit"][key]

        def patch(args: Any, extra: Any) -> Any:
            out = inner(args, extra)
            for entry, _ in entries:
                entry.kept[key]["img"][..., 0] += 1.0
            return out

        to["patches_replace"]["dit"][key] = patch
        return to

    monkeypatch.setattr(plans.DiTPlan, "record", spoil)
    out = tiny.sample(model, dit(model.model, double_blocks="2"), steps=2)
    assert (out - whole).abs().max() <= 5e-6 * whole.abs().max()
    assert "does not come out the same" in caplog.text


@pytest.mark.parametrize("masked", [None, "keys", "pairs", "bool"])
@pytest.mark.parametrize("text", [0, 5])
def test_image_tokens_see_themselves_and_the_text(text: int, masked: str | None) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, generator=random, dtype=torch.float64) for _ in range(3))
    mask = None
    if masked == "keys":
        mask = torch.randn(2, 17, generator=random, dtype=torch.float64)[:, None, None]
    elif masked == "pairs":
        mask = torch.randn(17, 17, generator=random, dtype=torch.float64)
    elif masked == "bool":
        mask = torch.rand(2, 17, generator=random) > 0.3
        mask[:, 0] = True
        mask = mask[:, None, None].expand(2, 1, 17, 17).clone()
        mask[:, :, range(17), range(17)] = True
    allowed = torch.ones(17, 17, dtype=torch.bool)
    allowed[text:, text:] = torch.eye(17 - text, dtype=torch.bool)
    bias = torch.zeros(2, 1, 17, 17, dtype=torch.float64)
    if mask is not None:
        whole = mask.expand(2, 1, 17, 17)
        bias = bias.masked_fill(~whole, -torch.inf) if mask.dtype == torch.bool else bias + whole
    bias = bias.masked_fill(~allowed, -torch.inf)
    reference = ((q @ k.transpose(-1, -2)) * 8**-0.5 + bias).softmax(-1) @ v
    for images, texts in (
        (slice(text, None), slice(0, text)),
        (torch.arange(text, 17), torch.arange(text)),
    ):
        out = joint.perturbed(q, k, v, mask, images, texts)
        assert torch.allclose(out, reference, atol=1e-12)


def test_another_nodes_patch_of_a_block_and_of_attention_stays() -> None:
    model = tiny.build("flux")
    calls: list[str] = []

    def louder(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        calls.append("block")
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.02}

    def flatter(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("attention")
        return func(q * 0.9, *args, **kwargs)

    def around(patcher: Any) -> Any:
        patcher = patcher.clone()
        patcher.set_model_patch_replace(louder, "dit", "single_block", 0)
        patcher.set_model_patch_replace(louder, "dit", "double_block", 0)
        patcher.model_options["transformer_options"]["optimized_attention_override"] = flatter
        return patcher

    alone = tiny.sample(model, dit(model.model, single_blocks="0,1"), steps=2)
    compared = compare(
        tiny.Tiny("flux", around(model.model), model.shape, model.tokens),
        lambda m, **k: dit(m, single_blocks="0,1", **k),
        steps=2,
    )
    holds(compared)
    assert {"block", "attention"} <= set(calls)
    assert (compared.shared - alone).abs().max() > 1e-3 * alone.abs().max()


def test_windows_and_refusals() -> None:
    model = tiny.build("flux")
    with tiny.counted(model.model.model.diffusion_model) as rows:
        tiny.sample(model, dit(model.model, end_percent=0.4, single_blocks="0"), steps=4)
    assert rows.count(1) in (1, 2)
    assert rows.count(2) == 4
    for widgets, message in (
        ({"double_blocks": "99"}, "has double blocks 0 to"),
        ({"single_blocks": "x"}, "is no block"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "lies behind"),
    ):
        with pytest.raises(ValueError, match=message):
            dit(model.model, **widgets)
    with pytest.raises(ValueError, match="has no single blocks"):
        dit(tiny.build("wan").model, single_blocks="0")
    with pytest.raises(ValueError, match="use PAG Fast"):
        dit(tiny.build("sd15").model)
