"""Softmax attention for the attending rows, perturbed attention for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .attention_arguments import check_attention, is_key_bias
from .backend import (
    check_backend,
    define,
    is_differentiated,
    is_left_alone,
    is_unwatched,
    measured_backend,
    resolve_backend,
    too_wide,
)
from .log_sum_exp import itself_and_text


def perturbed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_attend: int,
    num_context: int = 0,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    num_forked: int = 0,
    perturbation: str = "identity",
    strength: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention for rows ``< num_attend``, perturbed attention for those behind, one call.

    Shapes and meaning of every argument: :func:`pag_fast.ops.reference.perturbed_attention`. Any
    strides are accepted, and copied where kernels cannot address them; fp16, bf16, fp32, and fp64
    on the PyTorch backend.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    derived = check_attention(
        q, k, v, num_attend, num_context, attn_mask, num_forked, perturbation, strength
    )
    if derived and is_differentiated(q, k, v, attn_mask, strength):
        check_backend(backend)
        return torch_perturbed_attention(
            q, k, v, num_attend, num_context, attn_mask, scale, num_forked, perturbation, strength
        )
    backend = attention_backend(
        backend,
        v,
        num_attend=num_attend,
        num_context=num_context,
        attn_mask=attn_mask,
        perturbation=perturbation,
    )
    op = torch.ops.pag_fast.perturbed_attention.default
    run = _perturbed_attention if is_unwatched(v) else op
    rest = num_context, attn_mask, scale, num_forked, perturbation, strength, backend
    return run(q, k, v, num_attend, *rest)


def perturbed_attention_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_attend: int,
    num_context: int = 0,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`perturbed_attention` with the identity; ``v``'s memory may be used for the output.

    The PyTorch backend works in place and returns ``v``: without text tokens the identity rows of
    ``v`` already are the result, projecting V *is* writing them, and only the attending rows are
    overwritten. One Triton launch cannot: it returns a new tensor. Not for the fork, which has more
    rows than ``v``.
    """
    derived = check_attention(q, k, v, num_attend, num_context, attn_mask)
    if derived and is_differentiated(q, k, v, attn_mask):
        # attention has kept its values for the way back
        return perturbed_attention(
            q,
            k,
            v,
            num_attend=num_attend,
            num_context=num_context,
            attn_mask=attn_mask,
            scale=scale,
            backend=backend,
        )
    chosen = attention_backend(
        backend, v, num_attend=num_attend, num_context=num_context, attn_mask=attn_mask
    )
    if chosen == "triton":
        return perturbed_attention(
            q,
            k,
            v,
            num_attend=num_attend,
            num_context=num_context,
            attn_mask=attn_mask,
            scale=scale,
            backend=chosen,
        )
    op = torch.ops.pag_fast.perturbed_attention_.default
    run = _torch_perturbed_attention_ if is_unwatched(v) else op
    run(q, k, v, num_attend, num_context, attn_mask, scale)
    return v


def attention_backend(
    backend: str,
    v: torch.Tensor,
    *,
    num_attend: int,
    num_context: int = 0,
    attn_mask: torch.Tensor | None = None,
    perturbation: str = "identity",
) -> str:
    """What runs :func:`perturbed_attention`: ``"auto"`` asks the chip's table of measurements.

    Calls that are not in it: Triton for joint attention and for perturbations that PyTorch needs
    several launches for, in half precision; PyTorch's fused attention otherwise. Chips that have no
    table: PyTorch.
    """
    if is_left_alone(backend, v):
        return "torch"
    rows, tokens, _, head_dim = v.shape

    def unfit(v: torch.Tensor) -> str | None:
        if attn_mask is not None and not is_key_bias(attn_mask):
            return "the kernel takes no mask but a bias per key"
        if attn_mask is not None and num_context:
            # padded prompts are masked in joint attention: the kernel knows no bias there
            return "the kernel takes no mask with text tokens"
        return too_wide(v, 256)

    def default() -> str:
        dtype = str(v.dtype).removeprefix("torch.")
        found = measured_backend(
            v.device.type, v.device.index, dtype, head_dim, tokens, rows, num_attend, num_context
        )
        if found is not None:
            return found
        several = num_context > 0 or perturbation != "identity"
        return "triton" if several and v.dtype != torch.float32 else "torch"

    return resolve_backend(backend, v, unfit=unfit, default=default)


def torch_perturbed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    num_forked: int,
    perturbation: str = "identity",
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """The PyTorch backend of :func:`perturbed_attention`: SDPA on the attending rows."""
    out = forked_rows_like(v, num_forked)
    num_image = v.shape[1] - num_context
    source = reference.identity_rows(num_attend, num_forked)
    if perturbation == "soft":
        out[: v.shape[0]].copy_(softmax_attention(q, k, v, attn_mask, scale))
        if num_forked:
            out[num_attend:].copy_(out[source])
        assert strength is not None
        image = out[num_attend:, :num_image]
        image.lerp_(v[source, :num_image], strength.to(v.dtype)[:, None])
        return out
    mask = reference.rows_of(attn_mask, slice(num_attend))
    if num_attend:
        a = num_attend
        out[:a].copy_(softmax_attention(q[:a], k[:a], v[:a], mask, scale))
    if out.shape[0] == num_attend:
        return out
    mask = reference.rows_of(attn_mask, source)
    if perturbation == "blur":
        mean = q[source, :num_image].mean(1, keepdim=True)
        out[num_attend:, :num_image].copy_(
            softmax_attention(mean, k[source], v[source], mask, scale)
        )
    elif num_context == 0:
        out[num_attend:].copy_(v[source])
    else:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        image = out[num_attend:, :num_image]
        itself_and_text(
            q[source], k[source], v[source], image, num_image=num_image, scale=scale, mask=mask
        )
    if num_context:
        # a text query is not perturbed: where q, k and v are those of cond, so is its output
        out[num_attend:, num_image:].copy_(
            out[source, num_image:]
            if num_forked
            else softmax_attention(q[source, num_image:], k[source], v[source], mask, scale)
        )
    return out


def _perturbed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    num_forked: int,
    perturbation: str,
    strength: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    if backend == "torch":
        return torch_perturbed_attention(
            q, k, v, num_attend, num_context, attn_mask, scale, num_forked, perturbation, strength
        )
    from pag_fast_kernels import perturbed_attention as kernel

    bias = None
    if attn_mask is not None:
        bias = reference.rows_of(attn_mask, slice(q.shape[0]))
        assert bias is not None
        bias = bias.expand(q.shape[0], v.shape[2], 1, v.shape[1]).squeeze(2)
    return kernel(
        q,
        k,
        v,
        forked_rows_like(v, num_forked),
        num_attend=num_attend,
        num_context=num_context,
        num_forked=num_forked,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        perturbation=perturbation,
        strength=None if strength is None else strength.float(),
        key_bias=bias,
    )


def _torch_perturbed_attention_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> None:
    if num_attend:
        a, mask = num_attend, reference.rows_of(attn_mask, slice(num_attend))
        v[:a].copy_(softmax_attention(q[:a], k[:a], v[:a], mask, scale))
    if num_context == 0 or num_attend == v.shape[0]:
        return
    num_image = v.shape[1] - num_context
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q[num_attend:], k[num_attend:], v[num_attend:]
    # both read the values that they then replace
    mask = reference.rows_of(attn_mask, slice(num_attend, None))
    text = softmax_attention(q[:, num_image:], k, v, mask, scale)
    itself_and_text(q, k, v, v[:, :num_image], num_image=num_image, scale=scale, mask=mask)
    v[:, num_image:].copy_(text)


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch's attention on ``[rows, N, H, D]``, the layout of all ops here."""
    if attn_mask is not None and attn_mask.ndim < 2:
        # fused attention wants queries and keys
        attn_mask = attn_mask.reshape(1, -1)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_mask, scale=scale
    ).transpose(1, 2)


def attention_flops(
    v_shape: Sequence[int],
    num_attend: int,
    num_context: int,
    num_forked: int,
    perturbation: str = "identity",
) -> int:
    """Multiply-add FLOPs (2 per MAC) of QKᵀ and PV that :func:`perturbed_attention` needs."""
    rows, tokens, heads, dim = v_shape
    pair = 4 * heads * dim
    if perturbation == "soft":
        return rows * tokens * tokens * pair
    total = num_attend * tokens * tokens * pair
    perturbed = rows - num_attend + num_forked
    # keys of all image queries of a perturbed row
    keys = tokens if perturbation == "blur" else (tokens - num_context) * num_context
    text = (rows - num_attend) * num_context * tokens
    return total + (perturbed * keys + text) * pair


def forked_rows_like(v: torch.Tensor, num_forked: int) -> torch.Tensor:
    """An uninitialised output: the rows of ``v`` and ``num_forked`` more, contiguous."""
    return v.new_empty((v.shape[0] + num_forked, *v.shape[1:]))


define(
    "perturbed_attention(Tensor q, Tensor k, Tensor v, SymInt num_attend, SymInt num_context, "
    "Tensor? attn_mask, float? scale, SymInt num_forked, str perturbation, Tensor? strength, "
    "str backend) -> Tensor",
    _perturbed_attention,
    lambda q, k, v, num_attend, num_context, attn_mask, scale, num_forked, *_: forked_rows_like(
        v, num_forked
    ),
)
define(
    "perturbed_attention_(Tensor q, Tensor k, Tensor(a!) v, SymInt num_attend, "
    "SymInt num_context, Tensor? attn_mask, float? scale) -> ()",
    _torch_perturbed_attention_,
    lambda q, k, v, num_attend, num_context, attn_mask, scale: None,
)


@register_flop_formula(torch.ops.pag_fast.perturbed_attention)
def _(q, k, v, num_attend, num_context, attn_mask, scale, num_forked, perturbation, *_, **__):  # type: ignore[no-untyped-def]
    return attention_flops(v, num_attend, num_context, num_forked, perturbation)


@register_flop_formula(torch.ops.pag_fast.perturbed_attention_)
def _(q, k, v, num_attend, num_context, *_, **__):  # type: ignore[no-untyped-def]
    return attention_flops(v, num_attend, num_context, 0)
