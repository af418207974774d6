"""Tiny pipelines without PAG, and arguments of their calls."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import tiny
import torch
from copies import made_once
from editing import small_pictures

import pag_fast
from tiny_hosts import controlnets, images, swept, unets, videos
from tiny_hosts.spec import TEXT, HostSpec, pooled

_SPECS = [*unets.SPECS, *images.SPECS, *controlnets.SPECS, *videos.SPECS, *swept.SPECS]
HOSTS = {spec.name: spec for spec in _SPECS if spec.name in pag_fast.supported_pipelines()}
_VAES = {**images.VAES, **controlnets.VAES, **videos.VAES}
_PARTS = {**unets.PARTS, **images.PARTS, **controlnets.PARTS, **videos.PARTS}
_MODELS = {**images.MODELS, **videos.MODELS}


def _transformer(name: str) -> Any:
    return build(name).transformer


@made_once
def build(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny pipeline without PAG; ``overrides`` go to the denoiser's configuration."""
    spec = HOSTS[name]
    if spec.swept is not None:
        return swept.build(spec, **overrides).to(dtype=dtype)
    cls = getattr(diffusers, name)
    if spec.like:
        components = dict(tiny.build(spec.like, **{**spec.model, **overrides}).components)
        if name in _VAES:
            components["vae"] = tiny.randomise(_VAES[name]())
        parameters = inspect.signature(cls.__init__).parameters
        required = [x for x, p in parameters.items() if p.default is p.empty][1:]
        components = {x: components.get(x) for x in parameters if x in (*components, *required)}
        if name in _PARTS:
            torch.manual_seed(0)
            components.update(_PARTS[name]())
        if "safety_checker" in components:
            components["requires_safety_checker"] = False
        if "add_watermarker" in parameters:
            components["add_watermarker"] = False
        pipe = cls(**components)
    else:
        torch.manual_seed(0)
        parameters = inspect.signature(cls.__init__).parameters
        components = dict.fromkeys([x for x, p in parameters.items() if p.default is p.empty][1:])
        components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
        if name in _VAES:
            components["vae"] = tiny.randomise(_VAES[name]())
        if spec.family == "CogVideoXPipeline":
            components["scheduler"] = diffusers.CogVideoXDDIMScheduler()
        if name in _PARTS:
            components.update(_PARTS[name]())
        model = _MODELS[spec.family](**{**spec.model, **overrides})
        components["transformer"] = tiny.randomise(model)
        pipe = cls(**components)
    if name == "KolorsImg2ImgPipeline":
        pipe.encode_prompt = _encoded
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=dtype)


def _encoded(
    *, prompt_embeds: torch.Tensor, negative_prompt_embeds: Any, **_: Any
) -> tuple[Any, ...]:
    """What this pipeline's own makes: it cannot be given pooled embeddings, without an encoder."""
    added = pooled(len(prompt_embeds)).to(prompt_embeds.dtype)
    return prompt_embeds, negative_prompt_embeds, added, -added


def call_kwargs(
    name: str, pipe: Any, *, batch: int = 1, cfg: bool = True, steps: int = 2, **extra: Any
) -> dict[str, Any]:
    """Arguments of a call; equal calls give equal pictures."""
    spec = HOSTS[name]
    if spec.swept is not None:
        return {**swept.call_kwargs(spec, pipe, batch, cfg, steps), **extra}
    if spec.like:
        kwargs = tiny.call_kwargs(spec.like, pipe, batch=batch, cfg=cfg, steps=steps)
        for argument in ("pag_scale", *spec.without):
            del kwargs[argument]
        return {**kwargs, **_called(spec, batch), **extra}
    cfg = cfg and bool(spec.cfg)
    dtype = pipe.transformer.dtype
    source = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {"height": 64, "width": 64}
    for prefix in ("", "negative_") if cfg else ("",):
        embeds = torch.randn(batch, TEXT, 12, generator=source, device=source.device).to(dtype)
        pooled = torch.randn(batch, 10, generator=source, device=source.device).to(dtype)
        mask = torch.ones(batch, TEXT, dtype=torch.long)
        mask[0, -2:] = 0  # the first prompt is shorter
        kwargs[f"{prefix}prompt_embeds"] = embeds
        if spec.family in ("FluxPipeline", "HunyuanVideoPipeline"):
            kwargs[f"{prefix}pooled_prompt_embeds"] = pooled
        if spec.family == "QwenImagePipeline":
            kwargs[f"{prefix}prompt_embeds_mask"] = mask
        if spec.family in ("LTXPipeline", "HunyuanVideoPipeline", "Lumina2Pipeline"):
            kwargs[f"{prefix}prompt_attention_mask"] = mask
    if spec.cfg:
        kwargs[spec.cfg] = 5.0 if cfg else 1.0
    if spec.family == "CogVideoXPipeline":
        kwargs["use_dynamic_cfg"] = False
    kwargs.update(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    for argument in spec.without:
        del kwargs[argument]
    return {**kwargs, **_called(spec, batch), **extra}


def _called(spec: HostSpec, batch: int) -> dict[str, Any]:
    return {k: v(batch) if callable(v) else v for k, v in spec.call.items()}


def latents(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The final latents of ``pipe(**kwargs)``."""
    torch.manual_seed(0)  # control images are encoded with numbers of no generator
    with small_pictures(pipe):
        output = pipe(**kwargs)
    made = output.frames if hasattr(output, "frames") else output.images
    return torch.cat(made) if isinstance(made, list) else made


# the denoisers of hosts that the sweep builds, by class
SWEPT = {
    model: functools.partial(_transformer, name)
    for name, model in swept.DENOISERS.items()
    if name in HOSTS
}
