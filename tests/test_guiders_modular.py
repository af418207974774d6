"""Guiders in modular pipelines of diffusers, built from tiny models, end to end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import tiny
import torch
from modular import case, new_case, perturbed
from numerics import relative

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)
modular = pytest.importorskip("diffusers.modular_pipelines")

_SIZE = {"height": 64, "width": 64}
_VIDEO = {"height": 32, "width": 32, "num_frames": 9}
# blocks, those that are not needed, the case, further arguments
PIPELINES = {
    "StableDiffusionXLAutoBlocks": ("xl", {"height": 16, "width": 16}),
    "StableDiffusion3AutoBlocks": ("sd3", _SIZE),
    "QwenImageAutoBlocks": ("qwen", _SIZE),
    "WanBlocks": ("wan", _VIDEO),
    "LTXAutoBlocks": ("ltx", _VIDEO),
}


class SlowGuidance(diffusers.PerturbedAttentionGuidance):
    """Diffusers' guider, whose third pass perturbs in the plainest way."""

    def __init__(self, context: Any, **kwargs: Any) -> None:
        super().__init__(perturbed_guidance_layers=[0], **kwargs)
        self.context, self.stack = context, ExitStack()

    def prepare_models(self, denoiser: Any) -> None:
        self._count_prepared += 1
        if self._count_prepared == 3:
            self.stack.enter_context(self.context())

    def cleanup_models(self, denoiser: Any) -> None:
        self.stack.close()


def _scheduler(name: str) -> Any:
    if name == "wan":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    if name == "xl":
        return diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _pipeline(blocks: str) -> Any:
    """A pipeline without its guider, and the case that holds its model."""
    name = PIPELINES[blocks][0]
    if name in ("xl", "sd3"):
        setup = case(name, batch=1)
    else:
        more = {"in_channels": 16, "out_channels": 16} if name == "wan" else {}
        setup = new_case(name, batch=1, **more)
    made = getattr(modular, blocks)()
    for part in list(made.sub_blocks):
        if part != "denoise":
            made.sub_blocks.pop(part)
    pipe = made.init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(scheduler=_scheduler(name))
    pipe.update_components(**{"unet" if name == "xl" else "transformer": setup.model})
    if name == "xl":
        pipe.update_components(vae=tiny.vae())
    return pipe, setup


def _arguments(blocks: str, setup: Any) -> dict[str, Any]:
    name, arguments = PIPELINES[blocks]
    arguments = {**arguments, "num_inference_steps": 3, "output": "latents"}
    renamed = {
        "encoder_hidden_states": "prompt_embeds",
        "text_embeds": "pooled_prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "encoder_hidden_states_mask": "prompt_embeds_mask",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    for key, (cond, uncond) in setup.pairs.items():
        if key in renamed:
            arguments[renamed[key]], arguments[f"negative_{renamed[key]}"] = cond, uncond
    return {**arguments, "generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize("blocks", PIPELINES)
def test_modular_pipeline(blocks):
    pipe, setup = _pipeline(blocks)

    def run(guider: Any) -> torch.Tensor:
        pipe.update_components(guider=guider)
        return pipe(**_arguments(blocks, setup))

    ours = guiders.PerturbedAttentionGuidance(guidance_scale=5.0, perturbed_guidance_stop=1.0)
    naively = perturbed(setup, None)
    truth = run(SlowGuidance(naively, guidance_scale=5.0, perturbed_guidance_stop=1.0))
    result = run(ours)
    assert relative(result, truth) < 1e-5
    assert torch.equal(run(ours), result), "a second call gives another picture"
    assert not ours._warned, "the perturbed pass ran as a whole"
    assert relative(result, run(diffusers.ClassifierFreeGuidance(5.0))) > 1e-4
