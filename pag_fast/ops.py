"""The ops of pag_fast as ``torch.library`` custom ops: check, choose a backend, run.

Each op is opaque to ``torch.compile`` (a Python float handed to a traced kernel launch would become
fp64) and carries a fake implementation for shape inference and a FLOP formula, so that
``torch.utils.flop_counter`` sees the work that is done inside. They are defined on a ``Library``
rather than by the ``custom_op`` decorator, whose Python layers cost 10 to 25 µs in every call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference

BACKENDS = ("auto", "torch", "triton")

_LIBRARY = torch.library.Library("pag_fast", "DEF")


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pag_fast::{name}", fake, lib=_LIBRARY)


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` means on this installation: ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: unknown name, or ``"triton"`` without the kernels installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if backend == "triton" and importlib.util.find_spec("pag_fast_kernels") is None:
        raise ValueError(
            "backend='triton' needs the package pag_fast_kernels, which is not installed; "
            "backend='auto' or 'torch' works without it."
        )
    return "torch" if backend == "auto" else backend


# ---- perturbed_attention ----


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
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention for rows ``< num_attend``, identity attention for those behind, one call.

    Shapes and meaning of every argument: :func:`pag_fast.reference.perturbed_attention`. Any
    strides are accepted as long as the last one is 1 (a projection's own layout); fp16, bf16, fp32,
    fp64.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    _check_attention(q, k, v, num_attend, num_context, attn_mask, num_forked)
    resolve_backend(backend)
    return torch.ops.pag_fast.perturbed_attention.default(
        q, k, v, num_attend, num_context, attn_mask, scale, num_forked
    )


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
    """:func:`perturbed_attention` in place: ``v`` becomes the output and is returned.

    Without text tokens the identity rows of ``v`` already are the result: projecting V *is* writing
    them, and only the attending rows are overwritten. Not for the fork, which has more rows.
    """
    _check_attention(q, k, v, num_attend, num_context, attn_mask, 0)
    resolve_backend(backend)
    torch.ops.pag_fast.perturbed_attention_.default(
        q, k, v, num_attend, num_context, attn_mask, scale
    )
    return v


def _check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    num_forked: int,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "perturbed_attention takes q, k and v as [rows, tokens, heads, head_dim]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    rows, tokens = v.shape[:2]
    if not 0 < num_attend <= rows:
        raise ValueError(f"num_attend must be in 1..{rows} (the rows of v); got {num_attend}.")
    if not 0 <= num_context < tokens:
        raise ValueError(f"num_context must be in 0..{tokens - 1}; got {num_context}.")
    if num_forked and (rows != num_attend or not 0 < num_forked <= rows):
        raise ValueError(
            f"num_forked={num_forked} needs every row of v to attend and at most that many forks; "
            f"v has {rows} rows and num_attend is {num_attend}."
        )
    expected = (rows if num_context else num_attend, *v.shape[1:])
    if tuple(q.shape) != expected or tuple(k.shape) != expected:
        raise ValueError(
            f"q and k must have shape {expected} for v {tuple(v.shape)}, num_attend={num_attend} "
            f"and num_context={num_context}; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if attn_mask is not None and num_context:
        raise ValueError("attn_mask is for image-only attention; joint attention takes none.")


def torch_perturbed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    num_forked: int,
) -> torch.Tensor:
    """The PyTorch backend of :func:`perturbed_attention`: SDPA on the attending rows."""
    out = _forked_rows_like(v, num_forked)
    out[:num_attend].copy_(_sdpa(q[:num_attend], k[:num_attend], v[:num_attend], attn_mask, scale))
    if out.shape[0] == num_attend:
        return out
    source = reference.identity_rows(num_attend, num_forked)
    if num_context == 0:
        out[num_attend:].copy_(v[source])
        return out
    num_image = v.shape[1] - num_context
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out[num_attend:, :num_image].copy_(
        _itself_and_text(q[source], k[source], v[source], num_image, scale)
    )
    # a text query is not perturbed: where q, k and v are those of cond, so is its output
    out[num_attend:, num_image:].copy_(
        out[source, num_image:]
        if num_forked
        else _sdpa(q[source, num_image:], k[source], v[source], None, scale)
    )
    return out


def _torch_perturbed_attention_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> None:
    v[:num_attend].copy_(_sdpa(q[:num_attend], k[:num_attend], v[:num_attend], attn_mask, scale))
    if num_context == 0 or num_attend == v.shape[0]:
        return
    num_image = v.shape[1] - num_context
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q[num_attend:], k[num_attend:], v[num_attend:]
    # both read the values that they then replace
    text = _sdpa(q[:, num_image:], k, v, None, scale)
    v[:, :num_image].copy_(_itself_and_text(q, k, v, num_image, scale))
    v[:, num_image:].copy_(text)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_mask, scale=scale
    ).transpose(1, 2)


def _itself_and_text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_image: int, scale: float
) -> torch.Tensor:
    """Perturbed image queries: attention over the text keys, merged with each query's own key.

    With ``lse`` the log-sum-exp of the text scores, the softmax weight of the query's own key is
    ``sigmoid(qᵢ·kᵢ − lse)``: no score matrix with an extra column is ever built.
    """
    query, own_value = q[:, :num_image], v[:, :num_image]
    text, lse = _attention_with_lse(query, k[:, num_image:], v[:, num_image:], scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    own = (query.to(wide) * k[:, :num_image].to(wide)).sum(-1) * scale
    weight = torch.sigmoid(own - lse.to(wide)).unsqueeze(-1)
    return torch.lerp(text, own_value, weight.to(own_value.dtype))


# scores of at most this many elements are materialised at a time where no fused kernel returns its
# log-sum-exp: 64 MiB of fp32
_MAX_SCORES = 1 << 24


def _attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output ``[B, N, H, D]`` and the log-sum-exp of its scores ``[B, N, H]``."""
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float64):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, 0.0, False, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)
    return _chunked_attention_with_lse(*heads_first, scale)


def _chunked_attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, tokens), dtype=wide)
    step = max(1, _MAX_SCORES // (batch * heads * k.shape[2]))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        scores = (q[:, :, rows] @ k.transpose(-1, -2)).to(wide) * scale
        lse[:, :, rows] = torch.logsumexp(scores, -1)
        out[:, :, rows] = torch.softmax(scores, -1).to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def attention_flops(
    v_shape: Sequence[int], num_attend: int, num_context: int, num_forked: int
) -> int:
    """Multiply-add FLOPs (2 per MAC) of QKᵀ and PV that :func:`perturbed_attention` needs."""
    rows, tokens, heads, dim = v_shape
    pair = 4 * heads * dim
    total = num_attend * tokens * tokens * pair
    if num_context:
        num_image = tokens - num_context
        total += (rows - num_attend + num_forked) * num_image * num_context * pair
        total += (rows - num_attend) * num_context * tokens * pair
    return total


def _forked_rows_like(v: torch.Tensor, num_forked: int) -> torch.Tensor:
    return v.new_empty((v.shape[0] + num_forked, *v.shape[1:]))


_define(
    "perturbed_attention(Tensor q, Tensor k, Tensor v, SymInt num_attend, SymInt num_context, "
    "Tensor? attn_mask, float? scale, SymInt num_forked) -> Tensor",
    torch_perturbed_attention,
    lambda q, k, v, num_attend, num_context, attn_mask, scale, num_forked: _forked_rows_like(
        v, num_forked
    ),
)
_define(
    "perturbed_attention_(Tensor q, Tensor k, Tensor(a!) v, SymInt num_attend, "
    "SymInt num_context, Tensor? attn_mask, float? scale) -> ()",
    _torch_perturbed_attention_,
    lambda q, k, v, num_attend, num_context, attn_mask, scale: None,
)


@register_flop_formula(torch.ops.pag_fast.perturbed_attention)
def _(q, k, v, num_attend, num_context, attn_mask, scale, num_forked, *, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return attention_flops(v, num_attend, num_context, num_forked)


@register_flop_formula(torch.ops.pag_fast.perturbed_attention_)
def _(q, k, v, num_attend, num_context, attn_mask, scale, *, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return attention_flops(v, num_attend, num_context, 0)


# ---- linear_attention ----


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_attend: int,
    num_forked: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """ReLU linear attention (Sana) for rows ``< num_attend``, identity for the rows behind.

    Shapes and meaning of every argument: :func:`pag_fast.reference.linear_attention`. The sums over
    tokens are accumulated in fp32.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    _check_attention(q, k, v, num_attend, 0, None, num_forked)
    resolve_backend(backend)
    return torch.ops.pag_fast.linear_attention.default(q, k, v, num_attend, num_forked)


def torch_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_attend: int, num_forked: int
) -> torch.Tensor:
    """The PyTorch backend of :func:`linear_attention`: two batched matrix products."""
    wide = torch.promote_types(v.dtype, torch.float32)
    query = F.relu(q).to(wide).permute(0, 2, 3, 1)
    key = F.relu(k).to(wide).transpose(1, 2)
    # the row of ones makes the same product yield the denominator
    value = F.pad(v[:num_attend].to(wide).permute(0, 2, 3, 1), (0, 0, 0, 1), value=1.0)
    sums = (value @ key) @ query
    attended = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
    out = _forked_rows_like(v, num_forked)
    out[:num_attend].copy_(attended.permute(0, 3, 1, 2))
    out[num_attend:].copy_(v[reference.identity_rows(num_attend, num_forked)])
    return out


_define(
    "linear_attention(Tensor q, Tensor k, Tensor v, SymInt num_attend, SymInt num_forked) "
    "-> Tensor",
    torch_linear_attention,
    lambda q, k, v, num_attend, num_forked: _forked_rows_like(v, num_forked),
)


@register_flop_formula(torch.ops.pag_fast.linear_attention)
def _(q, k, v, num_attend, num_forked, *, out_shape=None, **_):  # type: ignore[no-untyped-def]
    _, tokens, heads, dim = v
    return num_attend * heads * tokens * dim * (dim + 1) * 4


# ---- combine_guidance ----


def combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    *,
    guidance_scale: float,
    pag_scale: float,
    rescale: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """The guided prediction ``u + g·(c − u) + s·(c − p)``, with CFG rescale where asked for.

    Arguments and dtypes: :func:`pag_fast.reference.combine_guidance`. Scales are Python floats, so
    that no step waits for the device; inside a ``torch.compile`` region the arithmetic is traced
    and fused by Inductor, outside it is one op.

    Raises:
        ValueError: branches of different shapes.
    """
    for name, branch in (("uncond", uncond), ("perturbed", perturbed)):
        if branch is not None and branch.shape != cond.shape:
            raise ValueError(
                f"{name} must have the shape of cond, {tuple(cond.shape)}; "
                f"got {tuple(branch.shape)}."
            )
    resolve_backend(backend)
    combine = (
        reference.combine_guidance
        if torch.compiler.is_compiling()
        else torch.ops.pag_fast.combine_guidance.default
    )
    return combine(uncond, cond, perturbed, guidance_scale, pag_scale, rescale)


def _torch_combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float,
    pag_scale: float,
    rescale: float,
) -> torch.Tensor:
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    # lerp and the scaled add: three launches where the formula as it is written takes six
    out = c if uncond is None else torch.lerp(uncond.to(wide), c, guidance_scale)
    if perturbed is not None:
        out = torch.add(out, c - perturbed.to(wide), alpha=pag_scale)
    if rescale:
        out = reference.rescale_to(out, c, rescale)
    out = out.to(cond.dtype)
    # an op may not return its input: CFG off without a perturbed branch leaves cond as it is
    return out.clone() if out is cond else out


_define(
    "combine_guidance(Tensor? uncond, Tensor cond, Tensor? perturbed, float guidance_scale, "
    "float pag_scale, float rescale) -> Tensor",
    _torch_combine_guidance,
    lambda uncond, cond, perturbed, guidance_scale, pag_scale, rescale: torch.empty_like(cond),
)
