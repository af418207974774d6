"""Which tokens are the image, and whether a transformer asks patches: seen, batch by batch."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_configs as configs
import torch
from patched import dit

# isort: split
import comfy.sample
from comfy_extras import nodes_easycache

from comfyui.sharing.dit import HOOKLESS


def _mean_of(model: tiny.Tiny, *conds: tiny.Cond) -> torch.Tensor:
    """One step is linear in the predictions of its prompts, so that it is that of each of them."""
    samples = [tiny.sample(model, dit(model.model), cond, steps=1) for cond in conds]
    return torch.stack(samples).mean(0)


@pytest.mark.parametrize("longer_first", [False, True])
@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_prompts_of_two_lengths(name: str, longer_first: bool) -> None:
    model = tiny.build(name)
    short, long = model.cond(1), model.cond(3, tokens=3 * model.tokens)
    conds = (long, short) if longer_first else (short, long)
    out = tiny.sample(model, dit(model.model), conds[0] + conds[1], steps=1)
    expected = _mean_of(model, *conds)
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()
    alone = _mean_of(model, short)
    assert (out - alone).abs().max() > 1e-3 * alone.abs().max()


@pytest.mark.parametrize("steps", [1, 4])
def test_prompts_that_take_turns(steps: int) -> None:
    """The first entry begins later, with other tokens than the second, which then ends."""
    model = tiny.build("z_image")
    later = model.cond(1, tokens=3 * model.tokens, start_percent=0.5)
    first = model.cond(3, end_percent=0.5)
    out = tiny.sample(model, dit(model.model), later + first, steps=steps)
    same = tiny.sample(model, dit(model.model), first + later, steps=steps)
    assert torch.equal(out, same)
    if steps == 1:
        assert torch.equal(out, tiny.sample(model, dit(model.model), model.cond(3), steps=1))


def test_an_area_of_the_picture() -> None:
    model = tiny.build("lumina2")
    area, whole = model.cond(1, area=(8, 16, 0, 0)), model.cond(3)
    out = tiny.sample(model, dit(model.model), area + whole, steps=1)
    same = tiny.sample(model, dit(model.model), whole + area, steps=1)
    assert (out - same).abs().max() <= 2e-5 * same.abs().max()
    # outside of the area there is one prompt alone, and the picture is as large
    alone = tiny.sample(model, dit(model.model), whole, steps=1)
    assert (out - alone)[:, :, 8:].abs().max() <= 2e-5 * alone.abs().max()
    assert (out - alone)[:, :, :8].abs().max() > 1e-3 * alone.abs().max()


def test_no_patch_of_another_node_sees_the_latents_that_show_the_tokens() -> None:
    model, seen = tiny.build("z_image"), []

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        if args["block_index"] == 0:
            seen.append(bool(args["img"].isfinite().all()))
        return {"img": args["img"] * 1.01}

    patcher = model.model.clone()
    patcher.set_model_double_block_patch(patch)
    tiny.sample(model, dit(patcher), steps=2)
    # a main pass and a perturbed pass in each step, and nothing else
    assert seen == [True] * 4


def test_a_transformer_whose_forward_a_cache_leaves_out_may_still_ask_patches() -> None:
    # its own copy, which was not seen to ask before
    model = tiny.build("flux", depth=2)
    net = model.model.model.diffusion_model
    cached = nodes_easycache.EasyCacheNode.execute(
        dit(model.model, single_blocks="0", start_percent=0.3), 1.5, 0.0, 1.0, False
    )
    tiny.sample(model, cached.result[0], steps=8, cfg=1.0)
    assert net not in HOOKLESS
    skipping = dit(model.model, single_blocks="0", perturbation="skip")
    out = tiny.sample(model, skipping, steps=1)
    plain = tiny.sample(model, steps=1)
    assert (out - plain).abs().max() > 1e-3 * plain.abs().max()


def test_pictures_with_sound_are_perturbed_in_their_pictures() -> None:
    """LTX-2 hands its blocks both; the perturbed attention is that of the picture."""
    supported = pytest.importorskip("comfy.supported_models")
    nested_tensor = pytest.importorskip("comfy.nested_tensor")
    if not hasattr(supported, "LTXAV"):
        pytest.skip("this engine has no LTX-2")
    patcher = tiny.patcher(supported.LTXAV, configs.LTX_AUDIO)
    random = torch.Generator().manual_seed(1)
    shapes = [(1, 128, 2, 8, 8), (1, 8, 10, 16)]
    noise = nested_tensor.NestedTensor([torch.randn(s, generator=random) for s in shapes])
    empty = nested_tensor.NestedTensor([torch.zeros(s) for s in shapes])
    conds = [[[torch.randn(1, 128, 2 * 3840, generator=random), {}]] for _ in range(2)]

    def sampled(model: Any) -> torch.Tensor:
        out = comfy.sample.sample(
            model, noise, 1, 4.0, "euler", "normal", *conds, empty, disable_pbar=True, seed=1
        )
        return torch.cat([part.flatten() for part in out.unbind()])

    plain, whole = sampled(patcher), sampled(dit(patcher, double_blocks="3", share=False))
    shared = sampled(dit(patcher, double_blocks="3"))
    assert (shared - whole).abs().max() <= 5e-6 * whole.abs().max()
    assert (whole - plain).abs().max() > 1e-3 * plain.abs().max()
