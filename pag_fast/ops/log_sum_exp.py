"""Attention that returns the log-sum-exp of its scores, and joint attention's image queries by it.

PyTorch's fused kernels compute the log-sum-exp anyway; only their ATen ops return it. Which of them
runs is PyTorch's own choice for :func:`torch.nn.functional.scaled_dot_product_attention`: its rules
on dtype, head dimension, compute capability and what the user has switched off are not copied here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from . import reference

# scores that are materialised at a time where no fused kernel runs: 64 MiB of fp32
_MAX_SCORES = 1 << 24
# elements of an image query's fp32 products that are materialised at a time: 256 MiB
_MAX_PRODUCTS = 1 << 26
_ALIGNMENT = 16  # bytes, of what the kernels load at once

_aten = torch.ops.aten

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    return out, lse


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return found[0], found[1]


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, False, scale=scale
    )
    # padded to a multiple of 32 queries
    return found[0], found[1][..., : q.shape[2]]


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, True, 0.0, False, False, scale=scale
    )
    # [rows, H, M, 1]
    return found[0], found[1].reshape(q.shape[:3])


def _chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where no fused kernel runs. Scores are fp32 before they are scaled, as in the kernels."""
    rows, heads, queries, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty((rows, heads, queries), dtype=wide)
    keys, values = k.to(wide).transpose(-1, -2), v.to(wide)
    step = max(1, _MAX_SCORES // max(1, rows * heads * k.shape[2]))
    for start in range(0, queries, step):
        some = slice(start, start + step)
        scores = (q[:, :, some].to(wide) @ keys).mul_(scale)
        if bias is not None:
            scores += bias
        lse[:, :, some] = torch.logsumexp(scores, -1)
        # where every key is hidden: 0, as in PyTorch's kernels
        out[:, :, some] = _aten._safe_softmax(scores, -1) @ values
    return out, lse


KERNELS: dict[str, Kernel] = {
    "cpu": _cpu,
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "chunks": _chunks,
}
"""By name: from ``(q, k, v, bias, scale)`` ``[rows, H, tokens, D]`` to the output, alike, and the
natural log-sum-exp ``[rows, H, M]``, fp32 or fp64."""

_NAMES = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}


def kernel_for(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> str:
    """Which of :data:`KERNELS` runs on q, k and v ``[rows, H, tokens, D]``.

    ``bias`` is the mask as the kernel would get it.
    """
    device = q.device.type
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    wanted = wanted or (bias is not None and bias.requires_grad)
    if forward_ad._current_level >= 0 or (wanted and torch.is_grad_enabled()):
        # the log-sum-exp of a fused kernel has no derivative
        return "chunks"
    if device == "meta":
        # nothing runs: the shapes and the FLOPs of what a GPU would run
        return _on_any_gpu(q, bias)
    if device == "cpu":
        choice = torch._fused_sdp_choice(q, k, v, bias)
        return "cpu" if choice == SDPBackend.FLASH_ATTENTION.value else "chunks"
    if device != "cuda" or torch.version.hip or not _whole_units(q):
        # AMD's kernels are others, and nobody has looked whether their logarithm is natural
        return "chunks"
    if bias is not None:
        # flash attention takes no mask; cuDNN's log-sum-exp of hidden rows is not documented
        call = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        return "efficient" if torch.backends.cuda.can_use_efficient_attention(call) else "chunks"
    return _NAMES.get(torch._fused_sdp_choice(q, k, v), "chunks")


def _whole_units(q: torch.Tensor) -> bool:
    """Whether heads begin on 16 bytes: SDPA pads heads that do not, its kernels do not."""
    return q.shape[-1] * q.element_size() % _ALIGNMENT == 0


def _on_any_gpu(q: torch.Tensor, bias: torch.Tensor | None) -> str:
    """The rules that hold on every GPU from sm_80 on, for what runs nowhere."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not _whole_units(q) or not (half or q.dtype == torch.float32):
        return "chunks"
    return "flash" if half and bias is None and q.shape[-1] <= 256 else "efficient"


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention ``[rows, M, H, D]`` and the log-sum-exp of its scores ``[rows, M, H]``.

    q ``[rows, M, H, D]``, k and v ``[rows, N, H, D]`` in any floating dtype; the log-sum-exp is
    natural, fp32 or fp64. ``bias`` ``[rows or 1, H or 1, 1, N]`` is added to the scores. A row
    whose keys are all hidden by it has the output 0 and the log-sum-exp −∞.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cuda":
        q, k, v = _on_units(q), _on_units(k), _on_units(v)
    hidden = None
    if bias is not None:
        # some kernels say 0 there
        hidden = (bias == float("-inf")).all(-1)
        bias = _bias_of(bias, q, k.shape[2])
    out, lse = KERNELS[kernel_for(q, k, v, bias)](q, k, v, bias, scale)
    if hidden is not None:
        lse = lse.masked_fill(hidden, float("-inf"))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _on_units(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where a row of a head does not begin on 16 bytes."""
    return x if is_aligned(x) else x.contiguous()


def is_aligned(x: torch.Tensor) -> bool:
    """Whether every last dimension of ``x`` begins on 16 bytes."""
    unit = _ALIGNMENT // x.element_size()
    return x.data_ptr() % _ALIGNMENT == 0 and all(s % unit == 0 for s in x.stride()[:-1])


def _bias_of(bias: torch.Tensor, q: torch.Tensor, keys: int) -> torch.Tensor:
    """The bias in q's dtype, expanded; its rows begin on 16 elements, as SDPA lays masks out."""
    padded = F.pad(bias.to(q.dtype), (0, -keys % 16))[..., :keys]
    return padded.expand(*q.shape[:3], keys)


def itself_and_text(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    num_image: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> None:
    """Fill ``out`` with what perturbed image queries get: attention over themselves and the text.

    With ``lse`` the log-sum-exp of the text scores, the softmax weight of the text is
    ``sigmoid(lse − qᵢ·kᵢ)``: no score matrix with an extra column is ever built. Scores, weights
    and their sums are fp32, whatever the dtype, so that a value is rounded once.

    Args:
        q, k, v: ``[rows, N, H, D]``, of which the first ``num_image`` tokens are the image.
        out: ``[rows, num_image, H, D]``; may be those tokens of ``v`` themselves.
        mask: of the keys, ``[rows or 1, H or 1, 1, N]``; its text part counts.
    """
    bias = None if mask is None else reference.additive(mask, q.dtype)[..., num_image:]
    text_keys, text_values = k[:, num_image:], v[:, num_image:]
    rows, _, heads, dim = q.shape
    step = max(1, _MAX_PRODUCTS // max(1, rows * heads * dim))
    for start in range(0, num_image, step):
        some = slice(start, min(start + step, num_image))
        query = q[:, some]
        text, lse = attention_with_lse(query, text_keys, text_values, scale, bias)
        zero = lse.new_zeros(1)
        # an fp32 addend promotes a product of halves before it is rounded, in the same launch
        own = torch.addcmul(zero, query, k[:, some]).sum(-1)
        weight = torch.sigmoid(torch.sub(lse, own, alpha=scale)).unsqueeze(-1)
        text = torch.addcmul(zero, weight, text)
        if text.requires_grad or forward_ad._current_level >= 0:
            out[:, some].copy_(torch.addcmul(text, 1 - weight, v[:, some]))
        else:
            torch.addcmul(text, 1 - weight, v[:, some], out=out[:, some])
