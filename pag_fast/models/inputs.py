"""Arguments with which diffusers' pipelines call a denoiser: shapes alone, for counting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

Inputs = Callable[[int], dict[str, Any]]
"""Forward arguments of a model for a number of rows."""

CLIP_TOKENS, T5_TOKENS = 77, 256
# as long as the pipelines pad prompts; Qwen-Image pads to the longest of a batch
FLUX_TOKENS, QWEN_TOKENS, WAN_TOKENS, LTX_TOKENS, LLAMA_TOKENS, GEMMA_TOKENS = (
    512,
    128,
    512,
    128,
    256,
    256,
)


@dataclass(frozen=True)
class Size:
    """Of a picture or a video: pixels, frames, and how many of them a latent pixel stands for.

    ``frames`` are those of the video, of which the first has a latent frame of its own and
    ``frame_factor`` others share one.
    """

    height: int
    width: int
    frames: int = 1
    vae_scale_factor: int = 8
    frame_factor: int = 1

    def __str__(self) -> str:
        size = f"{self.height}×{self.width}"
        return size if self.frames == 1 else f"{self.frames} frames of {size}"

    def but(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> Size:
        """The same with other numbers, where they are given.

        Raises:
            ValueError: a number that is no size, or frames of a picture.
        """
        given = {"height": height, "width": width, "frames": frames}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if frames is not None and self.frames == 1:
            raise ValueError("frames is for pipelines that make videos: this one makes pictures.")
        return replace(self, **{k: v for k, v in given.items() if v is not None})

    @staticmethod
    def of(pipe: Any) -> Size:
        """What a call of ``pipe`` makes unless it is told otherwise."""
        model = getattr(pipe, "unet", None) or pipe.transformer
        factor = _first(pipe, _SPATIAL, 8)
        default = inspect.signature(type(pipe).__call__).parameters
        found = {
            name: default[name].default if name in default else None
            for name in ("height", "width", "num_frames")
        }
        config = model.config
        sample = config.get("sample_size") or getattr(pipe, "default_sample_size", None) or 64
        rows, columns = (sample, sample) if isinstance(sample, int) else tuple(sample)[-2:]
        rows, columns = config.get("sample_height") or rows, config.get("sample_width") or columns
        return Size(
            found["height"] or int(rows) * factor,
            found["width"] or int(columns) * factor,
            found["num_frames"] or int(config.get("sample_frames") or 1),
            factor,
            _first(pipe, _TEMPORAL, 1),
        )

    def inputs(self, model: Any) -> Inputs:
        """Forward arguments of ``model`` at this size."""
        return lambda rows: forward_kwargs(model, rows=rows, **asdict(self))


_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def _first(pipe: Any, names: tuple[str, ...], otherwise: int) -> int:
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), otherwise)


def forward_kwargs(
    model: Any,
    *,
    rows: int,
    height: int,
    width: int,
    frames: int = 1,
    vae_scale_factor: int = 8,
    frame_factor: int = 1,
) -> dict[str, Any]:
    """Arguments of ``model.forward`` for ``rows`` rows, on its device and in its dtype.

    ``height`` and ``width`` are pixels; see :class:`Size`. Shapes and text lengths are those with
    which the pipelines of diffusers call the model; everything else follows from ``model.config``.
    Values are uninitialised: this is for counting.

    Raises:
        ValueError: a class that none of the pipelines uses.
    """
    name = type(model).__name__
    if name not in _MAKERS:
        raise ValueError(f"No inputs are known for {name}; known are {', '.join(_MAKERS)}.")
    parameter = next(model.parameters())
    new = _Maker(parameter.device, parameter.dtype)
    latent = (
        (frames - 1) // frame_factor + 1,
        height // vae_scale_factor,
        width // vae_scale_factor,
    )
    kwargs = _MAKERS[name](model, new, rows, latent)
    if name == "ControlNetModel":
        kwargs["controlnet_cond"] = new(rows, 3, height, width)
    return kwargs


Latent = tuple[int, int, int]
"""Latent frames, height and width."""


class _Maker:
    """Makes tensors for one model."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def mask(self, rows: int, tokens: int) -> torch.Tensor:
        """Of prompts that need no padding."""
        return torch.ones((rows, tokens), device=self.device, dtype=torch.int64).as_subclass(_Full)


class _Full(torch.Tensor):
    """A mask whose lengths can be read on the meta device, too: no token is padding."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.sum and args[0].is_meta:
                rows, tokens = args[0].shape
                return torch.full((rows,), tokens)
            return func(*args, **(kwargs or {}))


def _pixels(model: Any, latent: Latent) -> int:
    """Tokens of a picture."""
    return (latent[1] // model.config.patch_size) * (latent[2] // model.config.patch_size)


def _unet(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    frames = min(latent[0], config.get("motion_max_seq_length") or 0)
    shape = (rows, config.in_channels, *([frames] if frames else []), *latent[1:])
    text_dim = config.get("encoder_hid_dim") or config.cross_attention_dim
    tokens = 256 if config.get("encoder_hid_dim_type") == "text_proj" else CLIP_TOKENS
    kwargs: dict[str, Any] = {
        "sample": new(*shape),
        "timestep": 500,
        "encoder_hidden_states": new(rows * max(frames, 1), tokens, text_dim),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {"text_embeds": new(rows, pooled), "time_ids": new(rows, 6)}
    if config.get("time_cond_proj_dim"):
        kwargs["timestep_cond"] = new(rows, config.time_cond_proj_dim)
    return kwargs


def _sd3(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": new(rows, config.pooled_projection_dim),
    }


def _hunyuan(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    tokens = _pixels(model, latent)
    head_dim = model.inner_dim // config.num_attention_heads
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": new(rows, config.text_len, dtype=torch.int64),
        "encoder_hidden_states_t5": new(rows, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": new(rows, config.text_len_t5, dtype=torch.int64),
        "image_rotary_emb": (
            new(tokens, head_dim, dtype=torch.float32),
            new(tokens, head_dim, dtype=torch.float32),
        ),
    }
    if config.use_style_cond_and_image_meta_size:
        kwargs["image_meta_size"] = new(rows, 6)
        kwargs["style"] = new(rows, dtype=torch.int64)
    return kwargs


def _pixart(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, 300, config.caption_channels),
        "encoder_attention_mask": new(rows, 300, dtype=torch.int64),
    }
    if config.get("use_additional_conditions"):
        kwargs["added_cond_kwargs"] = {"resolution": new(rows, 2), "aspect_ratio": new(rows, 1)}
    elif type(model).__name__ == "PixArtTransformer2DModel":
        kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return kwargs


def _packed(latent: Latent) -> int:
    """Tokens of a picture whose latents are packed two by two by the pipeline."""
    return (latent[1] // 2) * (latent[2] // 2)


def _flux(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config, tokens = model.config, _packed(latent)
    return {
        "hidden_states": new(rows, tokens, config.in_channels),
        "timestep": new(rows),
        "guidance": new(rows, dtype=torch.float32) if config.guidance_embeds else None,
        "pooled_projections": new(rows, config.pooled_projection_dim),
        "encoder_hidden_states": new(rows, FLUX_TOKENS, config.joint_attention_dim),
        "txt_ids": new(FLUX_TOKENS, 3),
        "img_ids": new(tokens, 3),
    }


def _qwen(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, _packed(latent), config.in_channels),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, QWEN_TOKENS, config.joint_attention_dim),
        "encoder_hidden_states_mask": new(rows, QWEN_TOKENS, dtype=torch.int64),
        "img_shapes": [[(1, latent[1] // 2, latent[2] // 2)]] * rows,
    }
    # older diffusers asks the caller for the lengths
    if "txt_seq_lens" in inspect.signature(inspect.unwrap(type(model).forward)).parameters:
        kwargs["txt_seq_lens"] = [QWEN_TOKENS] * rows
    return kwargs


def _wan(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, WAN_TOKENS, config.text_dim),
    }


def _ltx(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config, (frames, height, width) = model.config, latent
    return {
        "hidden_states": new(rows, frames * height * width, config.in_channels),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, LTX_TOKENS, config.caption_channels),
        "encoder_attention_mask": new(rows, LTX_TOKENS, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _cogvideox(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config, (frames, height, width) = model.config, latent
    step = config.patch_size_t or 1
    frames = -(-frames // step) * step  # the pipeline makes up for what is missing
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, frames, config.in_channels, height, width),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, config.max_text_seq_length, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        table = (frames // step * _pixels(model, latent), config.attention_head_dim)
        kwargs["image_rotary_emb"] = (
            new(*table, dtype=torch.float32),
            new(*table, dtype=torch.float32),
        )
    return kwargs


def _hunyuan_video(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, LLAMA_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": new(rows, LLAMA_TOKENS, dtype=torch.int64),
        "pooled_projections": new(rows, config.pooled_projection_dim),
        "guidance": new(rows) if config.guidance_embeds else None,
    }


def _lumina2(model: Any, new: _Maker, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, GEMMA_TOKENS, config.cap_feat_dim),
        "encoder_attention_mask": new.mask(rows, GEMMA_TOKENS),
    }


_MAKERS: dict[str, Callable[[Any, _Maker, int, Latent], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNetMotionModel": _unet,
    "ControlNetModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "HunyuanDiT2DModel": _hunyuan,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "Lumina2Transformer2DModel": _lumina2,
}
