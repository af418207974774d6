"""Perturbed attention in a transformer, through ``optimized_attention_override``.

Image tokens attend to themselves and to the text; text tokens attend as ever. That is how
diffusers perturbs joint attention (its PAG for Stable Diffusion 3), and pag_fast everywhere.
Without text in the attention it returns v, as in UNets (arXiv 2403.17377).

A block's first attention is perturbed: those behind it attend to the text.
"""

from __future__ import annotations

from typing import Any

import torch

Tokens = slice | torch.Tensor  # where tokens stand in a sequence: a span, or their indices


class Overrides:
    """What the override of one pass knows of the block that runs.

    ``enter`` and ``leave`` are called around a perturbed block, in which ``attend`` then replaces
    the first attention whose queries and keys are the same tokens.

    Args:
        before: an override that another node has set.

    Attributes:
        seen: indices of the image tokens and of the others, where they were seen; None: the image
            stands behind the text.
    """

    def __init__(self, before: Any) -> None:
        self.before = before
        self.inside: tuple[int, int] | None = None
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self.entered = self.replaced = 0

    def enter(self, image: int, text: int) -> None:
        """A perturbed block begins on ``image`` tokens, with ``text`` tokens in front of them."""
        self.inside = (image, text)
        self.entered += 1

    def leave(self) -> None:
        """The block has ended, whether or not it has attended."""
        self.inside = None

    def __call__(self, func: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any):
        """Attention [B, N, heads × dim] or, with ``skip_output_reshape``, [B, heads, N, dim]."""
        if self.inside is None or _crosses(q, k, kwargs):
            return self.outside(func, q, k, v, heads, *args, **kwargs)
        inside, self.inside = self.inside, None
        self.replaced += 1
        mask = args[0] if args else kwargs.get("mask")
        q, k, v = (_by_heads(x, heads, kwargs) for x in (q, k, v))
        k, v = _for_each_head_of(q, k), _for_each_head_of(q, v)
        return _returned(self.attend(q, k, v, mask, inside, kwargs.get("scale")), kwargs)

    def outside(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attention that is not perturbed: the other node's override, or ComfyUI's."""
        if self.before is not None:
            return self.before(func, *args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self, q: Any, k: Any, v: Any, mask: Any, inside: tuple[int, int], scale: float | None
    ) -> torch.Tensor:
        """Perturbed attention [B, heads, N, dim]."""
        raise NotImplementedError


class Perturbed(Overrides):
    """Perturbed attention in the blocks of one pass."""

    def attend(
        self, q: Any, k: Any, v: Any, mask: Any, inside: tuple[int, int], scale: float | None
    ) -> torch.Tensor:
        """See :class:`Overrides`."""
        tokens, (image, text) = q.shape[2], inside
        if self.seen is not None:
            images, texts = self.seen
            image, text = len(images), len(texts)
        if tokens == image:
            return v
        if tokens != image + text:
            raise ValueError(
                f"the attention has {tokens} tokens, the block {image} of the image and {text} of "
                "the text, so that it cannot be told which to perturb; use perturbation 'skip'."
            )
        if self.seen is not None:
            return perturbed(q, k, v, mask, images, texts, scale)
        return perturbed(q, k, v, mask, slice(text, None), slice(0, text), scale)


class Seen(Exception):
    """Ends a forward at its first perturbed attention: the image tokens have been seen.

    Args:
        image: whether each token is one of the image [N].

    Attributes:
        tokens: indices of the image tokens, and of the others.
    """

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__("the image tokens have been seen")
        self.tokens = image.nonzero().squeeze(1), (~image).nonzero().squeeze(1)


class Probe(Overrides):
    """Shows which tokens are the image in a forward whose latents are NaN.

    Attention returns v on the way, so that NaN stays in the tokens that the latents became.
    """

    def outside(self, func: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any):
        """v where tokens attend to themselves, attention where they attend to the text."""
        if _crosses(q, k, kwargs):
            return func(q, k, v, heads, *args, **kwargs)
        q, v = _by_heads(q, heads, kwargs), _by_heads(v, heads, kwargs)
        return _returned(_for_each_head_of(q, v), kwargs)

    def attend(
        self, q: Any, k: Any, v: Any, mask: Any, inside: tuple[int, int], scale: float | None
    ) -> torch.Tensor:
        """Raise what was seen."""
        raise Seen(v.isnan().any(3).any(1).any(0))


def _crosses(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether q and k, as ComfyUI's attention functions take them, are of other tokens."""
    axis = 2 if kwargs.get("skip_reshape", False) else 1
    return q.shape[axis] != k.shape[axis]


def _by_heads(x: torch.Tensor, heads: int, kwargs: dict[str, Any]) -> torch.Tensor:
    """[B, heads, N, dim] of what ComfyUI's attention functions take.

    Stable Diffusion 3 hands over v as [B, N, heads, dim], the others [B, N, heads × dim].
    """
    if kwargs.get("skip_reshape", False):
        return x
    return (x if x.ndim == 4 else x.unflatten(2, (heads, -1))).transpose(1, 2)


def _for_each_head_of(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """k or v with as many heads as q: with grouped queries, each of them serves several of q."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _returned(out: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What ComfyUI's attention functions return of [B, heads, N, dim]."""
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def perturbed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    images: Tokens,
    texts: Tokens,
    scale: float | None = None,
) -> torch.Tensor:
    """Perturbed attention [B, heads, N, dim] of q, k, v [B, heads, N, dim].

    Args:
        mask: bool or added to the scores, [1 or B, 1 or heads, 1 or N, N] or with fewer
            dimensions, as ComfyUI's attention functions take it.
        images: image tokens, which attend to themselves and to the text.
        texts: text tokens, which attend to everything.
        scale: of the scores; None: 1 / √dim.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else _bias(mask, q)
    out = v.clone()
    out[:, :, images] = _themselves_and_text(
        q[:, :, images], k, v, images, texts, _rows(bias, images), scale
    )
    out[:, :, texts] = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, texts], k, v, _rows(bias, texts), scale=scale
    )
    return out


def _bias(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What is added to the scores [1 or B, 1 or heads, 1 or N, N], from ComfyUI's masks."""
    while mask.ndim < 4:
        mask = mask.unsqueeze(1 if mask.ndim == 3 else 0)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(q.dtype)


def _rows(bias: torch.Tensor | None, tokens: Tokens) -> torch.Tensor | None:
    """The rows of ``tokens``, where there is one for each token."""
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, tokens]


def _themselves_and_text(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    images: Tokens,
    texts: Tokens,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Image tokens [B, heads, I, dim] over their own value and those of the text.

    ``bias`` has one row for all image tokens, or one for each of them.
    """
    own = (q * k[:, :, images]).sum(-1, keepdim=True) * scale
    scores = q @ k[:, :, texts].transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[..., texts]
        across = bias[..., images]
        if bias.shape[2] == 1:
            own = own + across.transpose(-1, -2)
        else:
            own = own + across.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    precise = torch.promote_types(v.dtype, torch.float32)
    weights = torch.cat([own, scores], dim=-1).softmax(-1, dtype=precise).to(v.dtype)
    return weights[..., :1] * v[:, :, images] + weights[..., 1:] @ v[:, :, texts]
