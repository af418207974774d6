"""CFG + PAG (+ CFG rescale) from the three predictions."""

from __future__ import annotations

import torch

from .. import reference
from .backend import define, is_unwatched, resolve_backend


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
    and fused by Inductor, outside it is one launch on a GPU with Triton, two with rescale.

    Raises:
        ValueError: branches of different shapes, or a backend that is not available.
    """
    for name, branch in (("uncond", uncond), ("perturbed", perturbed)):
        if branch is not None and branch.shape != cond.shape:
            raise ValueError(
                f"{name} must have the shape of cond, {tuple(cond.shape)}; "
                f"got {tuple(branch.shape)}."
            )
    backend = resolve_backend(backend, cond, fits=cond.ndim > 1, default="triton")
    if torch.compiler.is_compiling():
        return reference.combine_guidance(
            uncond, cond, perturbed, guidance_scale, pag_scale, rescale
        )
    op = torch.ops.pag_fast.combine_guidance.default
    run = _combine_guidance if is_unwatched(cond) else op
    return run(uncond, cond, perturbed, guidance_scale, pag_scale, rescale, backend)


def _combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float,
    pag_scale: float,
    rescale: float,
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        from pag_fast_kernels import combine_guidance as kernel

        return kernel(
            None if uncond is None else flat_samples(uncond),
            flat_samples(cond),
            None if perturbed is None else flat_samples(perturbed),
            guidance_scale=guidance_scale,
            pag_scale=pag_scale,
            rescale=rescale,
        )
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    # lerp and the scaled add: three launches where the formula as it is written takes six
    out = c if uncond is None else torch.lerp(uncond.to(wide), c, guidance_scale)
    if perturbed is not None:
        out = torch.add(out, c - perturbed.to(wide), alpha=pag_scale)
    if rescale:
        out = reference.rescale_to(out, c, rescale)
    # an op may not return its input: CFG off without a perturbed branch leaves cond as it is; and
    # the layout is the fake's, whatever the branches' is
    out = out.to(cond.dtype).contiguous()
    return out.clone() if out is cond else out


def flat_samples(x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous samples, as a slice of a batch and of its channels has them already."""
    return x if x[0].is_contiguous() else x.contiguous()


define(
    "combine_guidance(Tensor? uncond, Tensor cond, Tensor? perturbed, float guidance_scale, "
    "float pag_scale, float rescale, str backend) -> Tensor",
    _combine_guidance,
    lambda uncond, cond, perturbed, guidance_scale, pag_scale, rescale, backend: cond.new_empty(
        cond.shape
    ),
)
