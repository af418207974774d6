"""What diffusers and accelerate put on a model, and what `pag_fast.runtime.compatibility` says."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import older
import pytest
import tiny
import tiny_hosts
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    CpuOffload,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    SmoothedEnergyGuidanceConfig,
    apply_group_offloading,
    apply_layer_skip,
)
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from strangers import CACHE, WEIGHTS, answers_of, flux, no_gradients, unet, wrap  # noqa: F401
from torch import nn

from pag_fast.runtime.compatibility import UNKNOWN, Answer, Compatibility, look, refuse

MODELS = {
    **{n: getattr(tiny, n) for n in ("unet", "motion_unet", "sd3", "hunyuan", "pixart", "sana")},
    **{
        n: getattr(tiny_hosts, n)
        for n in ("flux", "qwen", "wan", "ltx", "cogvideox", "hunyuan_video", "lumina2")
    },
    "controlnet": functools.partial(tiny.controlnet, False),
    "controlnet_xl": functools.partial(tiny.controlnet, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_stock_model_gives_no_findings(name: str) -> None:
    model = MODELS[name]().eval()
    assert look(model) == ()
    if hasattr(model, "cache_context"):
        with model.cache_context("cond"):  # leaves empty registries behind
            assert look(model) == ()
    assert Compatibility().look(model) == ()


# ---- caches and other hooks of diffusers ----


def _pab() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


def _taylor() -> Any:
    return diffusers.TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.ff"])


def _faster(distilled: bool) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        is_guidance_distilled=distilled,
    )


@pytest.mark.parametrize(
    ("what", "config", "answer", "apart"),
    [
        ("FirstBlockCache", lambda: diffusers.FirstBlockCacheConfig(0.2), CACHE, CACHE),
        (
            "MagCache",
            lambda: diffusers.MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4),
            CACHE,
            CACHE,
        ),
        ("TaylorSeerCache", _taylor, CACHE, CACHE),
        ("PyramidAttentionBroadcast", _pab, CACHE, Answer.REFUSE),
        ("FasterCache", lambda: _faster(True), CACHE, Answer.REFUSE),
        ("FasterCache", lambda: _faster(False), Answer.REFUSE, Answer.REFUSE),
    ],
)
def test_caches(what: str, config: Any, answer: Answer, apart: Answer) -> None:
    if not hasattr(diffusers, f"{what}Config"):
        pytest.skip(f"this diffusers has no {what}")
    model = tiny_hosts.cogvideox().eval()
    model.enable_cache(config())
    assert answers_of(model) == {what: answer}
    assert answers_of(model, passes_apart=True) == {what: apart}
    model.disable_cache()
    assert look(model) == ()


def test_layerwise_casting() -> None:
    model = flux()
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert answers_of(model) == {"layerwise casting": WEIGHTS}


@older.newest(older.GROUP_OFFLOADING)
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str) -> None:
    model = flux()
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, cpu, cpu, offload_type=kind, **blocks)
    assert answers_of(model) == {"group offloading": WEIGHTS}


def test_layer_skip_and_smoothed_energy() -> None:
    model = flux()
    apply_layer_skip(model, LayerSkipConfig([1], fqn="transformer_blocks"))
    assert answers_of(model) == {"layer skipping": Answer.UNSHARED | Answer.MAY_SKIP}
    model = flux()
    hook = AttentionProcessorSkipHook(lambda *a, **k: None, skip_attention_scores=True)
    attention = model.transformer_blocks[1].attn
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(hook, "skip")
    with pytest.raises(ValueError, match="skip_attention_scores"):
        refuse(look(model))
    model = tiny_hosts.cogvideox().eval()
    energy = SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, energy, 1.0)
    answer = Answer.UNSHARED | Answer.WEIGHTS_APART
    assert answers_of(model) == {"smoothed energy guidance": answer}


class _Hook(diffusers.hooks.ModelHook):
    pass


def test_hook_of_a_user_in_a_registry() -> None:
    model = flux()
    HookRegistry.check_if_exists_or_initialize(model.proj_out).register_hook(_Hook(), "mine")
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and finding.where == "proj_out" and "_Hook" in finding.what


def test_split_inference_is_refused() -> None:
    model: Any = tiny.motion_unet().eval()

    class SplitInferenceModule(nn.Module):
        pass

    class Derived(SplitInferenceModule):
        pass

    model.extra = Derived()
    with pytest.raises(ValueError, match="enable_free_noise"):
        refuse(look(model))


# ---- accelerate ----


def test_accelerate_offloading() -> None:
    model = unet()
    cpu_offload(model, torch.device("cpu"))
    answers = answers_of(model)
    assert answers == {
        "offloading of accelerate, layer by layer": WEIGHTS,
        "offloaded weights": WEIGHTS,
        **({"a device map": Answer.WEIGHTS_APART} if "a device map" in answers else {}),
    }
    remove_hook_from_module(model, recurse=True)
    model = unet()
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert answers_of(model) == {"a device map": Answer.WEIGHTS_APART}


@pytest.mark.parametrize("chained", [False, True])
def test_offloading_of_whole_models(chained: bool) -> None:
    model = unet()
    hook: Any = CpuOffload("cpu")
    add_hook_to_module(model, SequentialHook(hook, ModelHook()) if chained else hook)
    assert answers_of(model) == {"offloading of whole models": Answer.WEIGHTS_APART}
    remove_hook_from_module(model)
    assert look(model) == ()


class _Watching(ModelHook):
    pass


def test_unknown_hook_of_accelerate_and_a_wrapper_on_top_and_below() -> None:
    model = unet()
    add_hook_to_module(model.mid_block, _Watching())
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and "_Watching" in finding.what
    for below in (True, False):
        model = unet()
        if below:
            wrap(model.mid_block)
        add_hook_to_module(model.mid_block, ModelHook())
        if not below:
            assert look(model) == ()  # the base class does nothing
            wrap(model.mid_block)
        (finding,) = look(model)
        assert finding.answer == UNKNOWN and finding.what.startswith("a forward replaced by")


def test_mixed_precision_of_accelerate() -> None:
    from accelerate import Accelerator

    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(
        unet(), evaluation_mode=True
    )
    assert answers_of(model) == {"mixed precision of accelerate": WEIGHTS}
