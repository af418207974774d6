"""Tensors of the right shapes and nothing in them, for the arguments of a denoiser."""

from __future__ import annotations

from typing import Any

import torch

from ..sharing.tokens import Run

CLIP_TOKENS, T5_TOKENS = 77, 256
"""As long as the pipelines pad prompts."""

Latent = tuple[int, int, int]
"""Latent frames, height and width."""


class NewTensors:
    """Makes tensors for one model."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def mask(self, rows: int, tokens: int) -> torch.Tensor:
        """Of prompts that need no padding."""
        return torch.ones((rows, tokens), device=self.device, dtype=torch.int64).as_subclass(_Full)

    def told_mask(self, rows: int, tokens: int) -> torch.Tensor:
        """As :meth:`mask`, for a model that takes tokens out by it."""
        ones = torch.ones((rows, tokens), dtype=torch.int64, device="cpu")
        return ones.as_subclass(_Told) if self.device.type == "meta" else ones.to(self.device)

    def told_zeros(self, *shape: int) -> torch.Tensor:
        """Of what is not there, for a model that asks whether it is."""
        zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return zeros.as_subclass(_Told) if self.device.type == "meta" else zeros

    def table(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a rotary embedding."""
        return self(*shape, dtype=torch.float32), self(*shape, dtype=torch.float32)


class _Full(torch.Tensor):
    """A mask whose lengths can be read on the meta device, too: no token is padding."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.sum and args[0].is_meta:
                rows, tokens = args[0].shape
                return torch.full((rows,), tokens)
            return func(*args, **(kwargs or {}))


class _Told(torch.Tensor):
    """Values that a model asks for where no tensor has any.

    A mask is on the CPU, and on the meta device where numbers are computed with it. What is on the
    meta device itself is zero.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.unbind:  # what iterates over it calls
                return tuple(row.as_subclass(cls) for row in args[0].unbind())
            if func in (torch.Tensor.eq, torch.Tensor.__eq__) and args[0].is_meta:
                return torch.tensor(True, device="cpu")
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, torch.Tensor) or out.is_meta:
                return out
            computes = func in (torch.Tensor.float, torch.stack)
            return out.to("meta") if computes else out.as_subclass(cls)


def patches(model: Any, latent: Latent) -> int:
    """Tokens of a picture that the model cuts into patches."""
    return (latent[1] // model.config.patch_size) * (latent[2] // model.config.patch_size)


def text_in_front(model: Any, call: dict[str, Any]) -> tuple[Run, ...]:
    """Where the image's tokens are, of a model that puts all of its text in front of them."""
    return ((call["encoder_hidden_states"].shape[1], call["hidden_states"].shape[1], 0),)


def packed(latent: Latent) -> int:
    """Tokens of a picture whose latents are packed two by two by the pipeline."""
    return (latent[1] // 2) * (latent[2] // 2)


def text_and_image(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """How many tokens two streams have, the text's for each row alike, and the image's."""
    return (call["encoder_hidden_states"].shape[1],), call["hidden_states"].shape[1]
