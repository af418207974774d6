"""Pipelines without PAG in miniature, and PAG added to them the slow and obvious way.

``slow_pag`` runs the denoiser once more on the cond rows, with a dense mask in every perturbed
layer, and shares no code with the package but the names of layers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

TEXT = 5  # tokens of a prompt
_FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class HostSpec:
    """A pipeline without PAG.

    ``layers`` names a set with a fork in the middle and one that holds every layer; ``text`` says
    where text tokens are in the sequence an attention sees: ``"first"``, ``"last"`` or ``""``.
    """

    name: str
    layers: dict[str, list[str]]
    text: str = ""
    like: str = ""  # the PAG pipeline of tiny.py that has the same components
    cfg: str = "guidance_scale"
    call: dict[str, Any] = field(default_factory=dict)


def _like(name: str, text: str = "", **more: Any) -> HostSpec:
    pag = name.replace("ControlNetImg2Img", "ControlNetPAGImg2Img")
    pag = pag.replace("ControlNetInpaint", "ControlNetPAGInpaint")
    if "PAG" not in pag:
        for tail in ("Img2ImgPipeline", "InpaintPipeline", "Pipeline"):
            if pag.endswith(tail):
                pag = pag.removesuffix(tail) + "PAG" + tail
                break
    layers = {k: v for k, v in tiny.PIPELINES[pag].layers.items() if k in ("middle", "all")}
    return HostSpec(name, layers, text, pag, **more)


def _blocks(middle: list[str], every: str = "attn1") -> dict[str, list[str]]:
    return {"middle": middle, "all": [every]}


_VIDEO = {"height": 64, "width": 64, "num_frames": 5}
_SPECS = [
    _like("StableDiffusionPipeline"),
    _like("StableDiffusionImg2ImgPipeline"),
    _like("StableDiffusionInpaintPipeline"),
    _like("StableDiffusionControlNetPipeline"),
    _like("StableDiffusionControlNetInpaintPipeline"),
    _like("StableDiffusionXLPipeline"),
    _like("StableDiffusionXLImg2ImgPipeline"),
    _like("StableDiffusionXLControlNetPipeline"),
    _like("StableDiffusionXLControlNetImg2ImgPipeline"),
    _like("KolorsPipeline"),
    _like("AnimateDiffPipeline"),
    _like("StableDiffusion3Pipeline", text="last"),
    _like("StableDiffusion3Img2ImgPipeline", text="last"),
    _like("HunyuanDiTPipeline"),
    _like("PixArtSigmaPipeline"),
    _like("SanaPipeline"),
    HostSpec(
        "FluxPipeline",
        _blocks([r"^transformer_blocks\.1\.", r"single_transformer_blocks\.1\."], "attn"),
        text="first",
        cfg="true_cfg_scale",
    ),
    HostSpec(
        "QwenImagePipeline",
        _blocks([r"blocks\.1\.", r"blocks\.2\."], "attn"),
        text="first",
        cfg="true_cfg_scale",
    ),
    HostSpec("WanPipeline", _blocks([r"blocks\.1\.", r"blocks\.2\."]), call=_VIDEO),
    HostSpec(
        "LTXPipeline", _blocks([r"blocks\.1\.", r"blocks\.2\."]), call={**_VIDEO, "num_frames": 9}
    ),
    HostSpec(
        "CogVideoXPipeline", _blocks([r"blocks\.1\.", r"blocks\.2\."]), text="first", call=_VIDEO
    ),
    HostSpec(
        "HunyuanVideoPipeline",
        _blocks([r"^transformer_blocks\.1\.", r"single_transformer_blocks\.1\."], "attn"),
        text="last",
        cfg="true_cfg_scale",
        call=_VIDEO,
    ),
    HostSpec("Lumina2Pipeline", _blocks([r"layers\.1\.", r"layers\.2\."], "layers"), text="first"),
]
HOSTS = {spec.name: spec for spec in _SPECS if hasattr(diffusers, spec.name)}


# ---- models ----


def flux(**overrides: Any) -> Any:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return diffusers.FluxTransformer2DModel(**{**config, **overrides})


def qwen(**overrides: Any) -> Any:
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (2, 2, 4),
    }
    return diffusers.QwenImageTransformer2DModel(**{**config, **overrides})


def wan(**overrides: Any) -> Any:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 4,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**{**config, **overrides})


def ltx(**overrides: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 4,
        "caption_channels": 12,
    }
    return diffusers.LTXVideoTransformer3DModel(**{**config, **overrides})


def cogvideox(**overrides: Any) -> Any:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 12,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    return diffusers.CogVideoXTransformer3DModel(**{**config, **overrides})


def hunyuan_video(**overrides: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 12,
        "pooled_projection_dim": 10,
        "rope_axes_dim": (2, 2, 4),
    }
    return diffusers.HunyuanVideoTransformer3DModel(**{**config, **overrides})


def lumina2(**overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 12,
    }
    return diffusers.Lumina2Transformer2DModel(**{**config, **overrides})


_NEW = {
    "FluxPipeline": (flux, ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    "QwenImagePipeline": (qwen, ("text_encoder", "tokenizer")),
    "WanPipeline": (wan, ("text_encoder", "tokenizer")),
    "LTXPipeline": (ltx, ("text_encoder", "tokenizer")),
    "CogVideoXPipeline": (cogvideox, ("text_encoder", "tokenizer")),
    "HunyuanVideoPipeline": (
        hunyuan_video,
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    ),
    "Lumina2Pipeline": (lumina2, ("text_encoder", "tokenizer")),
}


# ---- pipelines ----


def build(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny pipeline without PAG; ``overrides`` go to the denoiser's configuration."""
    spec = HOSTS[name]
    cls = getattr(diffusers, name)
    if spec.like:
        components = dict(tiny.build(spec.like, **overrides).components)
        if "safety_checker" in components:
            components["requires_safety_checker"] = False
        if spec.like.startswith("StableDiffusionXL"):
            components["add_watermarker"] = False
        pipe = cls(**components)
    else:
        torch.manual_seed(0)
        model, missing = _NEW[name]
        components = dict.fromkeys(("vae", *missing))
        components["scheduler"] = _FLOW()
        if name == "CogVideoXPipeline":
            components["scheduler"] = diffusers.CogVideoXDDIMScheduler()
        components["transformer"] = tiny.randomise(model(**overrides))
        pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=dtype)


def call_kwargs(
    name: str, pipe: Any, *, batch: int = 1, cfg: bool = True, steps: int = 2, **extra: Any
) -> dict[str, Any]:
    """Arguments of a call; equal calls give equal pictures."""
    spec = HOSTS[name]
    if spec.like:
        kwargs = tiny.call_kwargs(spec.like, pipe, batch=batch, cfg=cfg, steps=steps)
        del kwargs["pag_scale"]
        return {**kwargs, **extra}
    dtype = pipe.transformer.dtype
    source = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {"height": 64, "width": 64}
    for prefix in ("", "negative_") if cfg else ("",):
        embeds = torch.randn(batch, TEXT, 12, generator=source).to(dtype)
        pooled = torch.randn(batch, 10, generator=source).to(dtype)
        mask = torch.ones(batch, TEXT, dtype=torch.long)
        mask[0, -2:] = 0  # the first prompt is shorter
        kwargs[f"{prefix}prompt_embeds"] = embeds
        if name in ("FluxPipeline", "HunyuanVideoPipeline"):
            kwargs[f"{prefix}pooled_prompt_embeds"] = pooled
        if name == "QwenImagePipeline":
            kwargs[f"{prefix}prompt_embeds_mask"] = mask
        if name in ("LTXPipeline", "HunyuanVideoPipeline", "Lumina2Pipeline"):
            kwargs[f"{prefix}prompt_attention_mask"] = mask
    kwargs[spec.cfg] = 5.0 if cfg else 1.0
    if name == "CogVideoXPipeline":
        kwargs["use_dynamic_cfg"] = False
    kwargs.update(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return {**kwargs, **spec.call, **extra}


def latents(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The final latents of ``pipe(**kwargs)``."""
    output = pipe(**kwargs)
    return output.frames if hasattr(output, "frames") else output.images


# ---- PAG, the slow way ----


class _Identity(TorchFunctionMode):
    """Attention over image tokens is the identity; text queries and text keys are as they were."""

    def __init__(self, text: str, lengths: list[int], image: int) -> None:
        super().__init__()
        self.text, self.lengths, self.image = text, lengths, image

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        kwargs = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, mask = kwargs["query"], kwargs.pop("attn_mask", None)
        rows, _, total, _ = query.shape
        allowed = torch.ones(rows, 1, total, total, dtype=torch.bool)
        for row in range(rows):
            if not self.text:
                image = torch.arange(total)
            elif self.text == "last":
                image = torch.arange(self.image)
            else:
                image = torch.arange(self.image) + self.lengths[row % len(self.lengths)]
            block = torch.zeros(total, total, dtype=torch.bool)
            block[image[:, None], image] = True
            allowed[row, 0] = ~block | torch.eye(total, dtype=torch.bool)
        added = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, float("-inf"))
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
            added = added + mask
        return func(attn_mask=added, **kwargs)


def _text_and_image(name: str, call: dict[str, Any]) -> tuple[list[int], int]:
    sample = call.get("hidden_states")
    if name == "Lumina2Pipeline":
        return call["encoder_attention_mask"].sum(1).tolist(), sample[0, 0].numel() // 4
    text = call.get("encoder_hidden_states")
    length = [0] if text is None else [text.shape[1]]
    if name in ("FluxPipeline", "QwenImagePipeline"):
        return length, sample.shape[1]
    if name == "CogVideoXPipeline":
        return length, sample.shape[1] * sample[0, 0, 0].numel() // 4
    if name in ("HunyuanVideoPipeline", "StableDiffusion3Pipeline"):
        return length, sample[0, 0].numel() // 4
    if name == "StableDiffusion3Img2ImgPipeline":
        return length, sample[0, 0].numel() // 4
    return [0], 0


def _linear_identity(attn: Any) -> Any:
    """Sana's linear attention with V in place of its result."""

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))

    return forward


@contextlib.contextmanager
def slow_pag(
    pipe: Any,
    name: str,
    attentions: list[Any],
    pag_scale: Any,
    cfg_scale: float,
    fresh: Any = lambda index, latents: True,
) -> Any:
    """``pipe`` with PAG on ``attentions``: a forward of its own for the perturbed branch.

    ``pag_scale`` is a number, or a function of the step; ``fresh`` says in which steps there is a
    perturbed branch, whose difference the others use again.
    """
    spec = HOSTS[name]
    batched = spec.cfg == "guidance_scale" and name not in ("WanPipeline", "Lumina2Pipeline")
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    own, passes, held = model.forward, [0], [None]

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters = list(inspect_parameters(model))
        call = {**dict(zip(parameters, args, strict=False)), **kwargs}
        out = own(**call)
        both = batched and cfg_scale > 1
        index = passes[0]
        passes[0] += 1
        if not batched and cfg_scale > 1:
            if index % 2:
                return out  # the uncond pass
            index //= 2
        rows = call["sample" if "sample" in call else "hidden_states"].shape[0]
        frames = call["sample"].shape[2] if "sample" in call and call["sample"].ndim == 5 else 1
        cond = {k: _second_half(k, v, rows, frames) for k, v in call.items()} if both else call
        lengths, image = _text_and_image(name, cond)
        scale = pag_scale(index) if callable(pag_scale) else pag_scale
        prediction, g = out[0], cfg_scale if cfg_scale > 1 else 1.0
        uncond, cond_out = prediction.chunk(2) if both else (prediction[:0], prediction)
        if fresh(index, cond["sample" if "sample" in cond else "hidden_states"]):
            with _perturbed(attentions, spec.text, lengths, image):
                held[0] = cond_out - own(**cond)[0]
        guided = torch.cat([uncond, cond_out + scale / g * held[0]])
        return (guided,) if isinstance(out, tuple) else type(out)(sample=guided)

    model.forward = forward
    try:
        yield pipe
    finally:
        del model.forward


def inspect_parameters(model: Any) -> Any:
    import inspect

    return list(inspect.signature(inspect.unwrap(type(model).forward)).parameters)[1:]


def _second_half(key: str, value: Any, rows: int, frames: int) -> Any:
    if key in ("image_rotary_emb", "img_ids", "txt_ids"):
        return value
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] in (rows, rows * frames):
        return value[value.shape[0] // 2 :]
    if isinstance(value, list | tuple):
        return type(value)(_second_half("", x, rows, frames) for x in value)
    if isinstance(value, dict):
        return {k: _second_half(k, x, rows, frames) for k, x in value.items()}
    return value


@contextlib.contextmanager
def _perturbed(attentions: list[Any], text: str, lengths: list[int], image: int) -> Any:
    undo = []
    for attn in attentions:
        if "Linear" in type(attn.processor).__name__:
            attn.forward = _linear_identity(attn)
            undo.append(lambda attn=attn: vars(attn).pop("forward"))
            continue
        # SD3.5's second attention has no text
        mode = _Identity(text, lengths, image)

        def before(module: Any, args: Any, kwargs: Any, mode: Any = mode) -> None:
            mode.__enter__()

        def after(module: Any, args: Any, out: Any, mode: Any = mode) -> None:
            mode.__exit__(None, None, None)

        undo.append(attn.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.append(attn.register_forward_hook(after).remove)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
