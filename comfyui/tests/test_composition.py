"""Beside other nodes, other guiders and other samplers, on either side of this pack's node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import loaded
import pytest
import tiny
import torch
from patched import compare, costs, dit, holds, pag

# isort: split
import comfy.samplers
from comfy_extras import (
    nodes_custom_sampler,
    nodes_easycache,
    nodes_freelunch,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_perpneg,
    nodes_sag,
)

SIZE = (1, 4, 16, 16)


def _result(output: Any) -> Any:
    return output.result[0] if hasattr(output, "result") else output[0]


def _freeu(model: Any) -> Any:
    return _result(nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2))


def _kohya(model: Any) -> Any:
    node = nodes_model_downscale.PatchModelAddDownscale
    return _result(node.execute(model, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"))


def _rescale(model: Any) -> Any:
    return _result(nodes_model_advanced.RescaleCFG().patch(model, 0.7))


def _sag(model: Any) -> Any:
    return _result(nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0))


NODES: dict[str, Callable[[Any], Any]] = {
    "FreeU": _freeu,
    "Kohya": _kohya,
    "RescaleCFG": _rescale,
    "SAG": _sag,
    "core's PAG": tiny.stock,
    "our PAG": lambda model: pag(model, unet_block="output", unet_block_id=3),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("node", NODES)
def test_beside_another_node(node: str, after: bool) -> None:
    """PAG acts, and the picture is that of a whole pass beside the same node."""
    model, other = tiny.build("sd15"), NODES[node]
    # half of 16 × 16 would leave the middle block one token, which has nobody else to attend to
    shape = (1, 4, 32, 32) if node == "Kohya" else model.shape
    if after:
        compared = compare(model, pag, other, steps=2, shape=shape)
    else:
        inner = tiny.Tiny("sd15", other(model.model), model.shape, model.tokens)
        compared = compare(inner, pag, steps=2, shape=shape)
    holds(compared)
    costs(compared, most=2.0, saved=0.08)


def _conds() -> dict[str, tiny.Cond]:
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    masked = {"mask_strength": 1.0, "set_area_to_bounds": False}
    cond = tiny.cond
    return {
        "areas": cond(1, area=(16, 8, 0, 0), strength=0.8) + cond(3),
        "masks": cond(1, mask=mask, **masked) + cond(3, mask=1 - mask, **masked),
        "timesteps": cond(1, end_percent=0.5) + cond(3, start_percent=0.5),
        "longer": cond(1, tokens=154),
    }


@pytest.mark.parametrize("kind", _conds())
def test_areas_masks_timesteps_and_long_prompts(kind: str) -> None:
    compared = compare(tiny.build("sd15"), pag, positive=_conds()[kind], steps=3)
    holds(compared)
    costs(compared, most=2.0, saved=0.1)


# Heun's second evaluation divides by a noise level that is small: it amplifies rounding
SAMPLERS = {
    "euler_cfg_pp": 5e-6,
    "dpmpp_2m": 5e-6,
    "heun": 2e-5,
    "dpmpp_2s_ancestral_cfg_pp": 5e-6,
    "euler_ancestral": 5e-6,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str) -> None:
    compared = compare(tiny.build("sd15"), pag, sampler=sampler, steps=3)
    holds(compared, SAMPLERS[sampler])
    costs(compared, 1.345)


def _perpneg(model: Any) -> Any:
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
    guider.set_cfg(5.0, 1.0)
    return guider


def _dual(model: Any, nested: bool) -> Any:
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
    guider.set_cfg(5.0, 2.0, nested)
    return guider


def _guided(make: Callable[[Any], Any]) -> Callable[..., torch.Tensor]:
    def sample(model: tiny.Tiny, patcher: Any, steps: int) -> torch.Tensor:
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
        sampling = patcher.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        sampler = comfy.samplers.sampler_object("euler")
        return make(patcher).sample(
            noise, torch.zeros(SIZE), sampler, sigmas, disable_pbar=True, seed=1
        )

    return sample


@pytest.mark.parametrize(
    "make",
    [_perpneg, lambda m: _dual(m, False), lambda m: _dual(m, True)],
    ids=["PerpNeg", "DualCFG", "nested DualCFG"],
)
def test_guiders_of_three_conditionings(make: Callable[[Any], Any]) -> None:
    compared = compare(tiny.build("sd15"), pag, sample=_guided(make), steps=3)
    holds(compared)
    costs(compared, 1.235)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("lazy", [False, True], ids=["EasyCache", "LazyCache"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_caches_of_steps(name: str, lazy: bool, after: bool) -> None:
    """A cache that leaves forwards out leaves the same ones out, and never half a record."""
    model = tiny.build(name)
    node = nodes_easycache.LazyCacheNode if lazy else nodes_easycache.EasyCacheNode

    def cached(patcher: Any) -> Any:
        return _result(node.execute(patcher, 0.6, 0.0, 1.0, False))

    patch = pag if name == "sd15" else (lambda m, **k: dit(m, single_blocks="0", **k))
    if after:
        compared = compare(model, patch, cached, steps=6)
    else:
        inner = tiny.Tiny(name, cached(model.model), model.shape, model.tokens)
        compared = compare(inner, patch, steps=6)
    assert compared.error <= 5e-6
    assert compared.effect > 1e-4


def test_a_hypernetworks_patch_and_a_lora_act_in_both_passes() -> None:
    model = tiny.build("sd15")

    def around(patcher: Any) -> Any:
        patcher = patcher.clone()
        patcher.set_model_attn1_patch(lambda q, k, v, extra: (q * 1.1, k, v * 0.9))
        key = "diffusion_model.middle_block.1.proj_in.weight"
        weight = patcher.model.state_dict()[key]
        patcher.add_patches({key: ("diff", (torch.full_like(weight, 0.01),))})
        return patcher

    plain = tiny.sample(model, pag(model.model), steps=2)
    compared = compare(model, pag, around, steps=2)
    holds(compared)
    # the first step is computed whole, to compare it with the main pass; each that follows shares
    more = compare(model, pag, around, steps=3)
    behind = [3 * m - 2 * c for m, c in zip(more.ratios, compared.ratios, strict=True)]
    costs(dataclasses.replace(more, ratios=(behind[0], behind[1])), 1.345)
    assert (compared.shared - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(plain, tiny.sample(model, pag(model.model), steps=2))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_compiled_models(name: str) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = tiny.build(name), CompileCounter()

    def compiled(patcher: Any) -> Any:
        patcher = patcher.clone()
        set_torch_compile_wrapper(model=patcher, backend=counter)
        return patcher

    patch = pag if name == "sd15" else (lambda m, **k: dit(m, single_blocks="0", **k))
    eager = tiny.sample(model, patch(model.model), steps=2)
    out = tiny.sample(model, compiled(patch(model.model)), steps=2)
    assert (out - eager).abs().max() <= 2e-5 * eager.abs().max()
    graphs = counter.frame_count
    tiny.sample(model, compiled(patch(model.model)), steps=3)
    assert graphs > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sd15", "flux", "z_image"])
def test_a_compilation_that_ignores_patches(name: str) -> None:
    """Core's node drops the guards on patches; without CFG both passes have one shape."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    model = tiny.build(name)
    patch = pag if name == "sd15" else dit
    eager = tiny.sample(model, patch(model.model), steps=1, cfg=1.0)
    compiled = patch(model.model).clone()
    set_torch_compile_wrapper(
        model=compiled,
        backend=lambda graph, inputs, **_: graph.forward,
        options={"guard_filter_fn": skip_torch_compile_dict},
    )
    out = tiny.sample(model, compiled, steps=1, cfg=1.0)
    assert (out - eager).abs().max() <= 2e-5 * eager.abs().max()
    plain = tiny.sample(model, steps=1, cfg=1.0)
    assert (out - plain).abs().max() > 1e-3 * plain.abs().max()
    torch._dynamo.reset()


def test_versions_before_the_patch_of_layers_compute_whole(caplog: Any) -> None:
    if loaded.at_least("0.20.1"):
        pytest.skip("this engine asks the patch for every layer")
    compared = compare(tiny.build("sd15"), pag, steps=2)
    assert torch.equal(compared.shared, compared.whole)
    assert "computes its perturbed pass whole" in caplog.text
