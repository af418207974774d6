"""CFG + PAG from the three predictions, rescaled where asked for.

Mode ``"snf"`` has no kernel: it blurs two planes and compares their softmaxes, which would be two
launches that read every prediction nine times, in place of some 30 small ones, once in a step that
has a thousand and more. PyTorch runs it on every backend; where it is compiled, Inductor fuses it.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import reference
from .backend import (
    check_backend,
    define,
    is_differentiated,
    is_unwatched,
    resolve_backend,
    too_large,
)


def combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    *,
    guidance_scale: float,
    pag_scale: float,
    rescale: float = 0.0,
    rescale_mode: str = "cfg",
    backend: str = "auto",
) -> torch.Tensor:
    """The guided prediction ``u + g·(c − u) + s·(c − p)``, rescaled where asked for.

    Arguments, modes and dtypes: :func:`pag_fast.ops.reference.combine_guidance`. Scales are Python
    floats, so that no step waits for the device; inside a ``torch.compile`` region the arithmetic
    is traced and fused by Inductor, outside it is one launch on a GPU with Triton, two with
    rescale.

    Raises:
        ValueError: branches of different shapes or of integers, an unknown mode, ``"snf"``
            with a strength or with predictions that are no pictures, or a backend that is not
            available.
    """
    # attributes are read without a call
    derived = forward_ad._current_level >= 0
    for name, branch in (("uncond", uncond), ("cond", cond), ("perturbed", perturbed)):
        if branch is None:
            continue
        if branch.shape != cond.shape:
            raise ValueError(
                f"{name} must have the shape of cond, {tuple(cond.shape)}; "
                f"got {tuple(branch.shape)}."
            )
        if not (branch.dtype.is_floating_point or branch.dtype.is_complex):
            raise ValueError(
                f"Predictions are floating-point numbers: {name} is {branch.dtype}, which would "
                "cut off what is behind the point."
            )
        derived = derived or branch.requires_grad
    check_rescale_mode(rescale_mode)
    if rescale_mode == "snf":
        _check_pictures(cond, rescale)
        check_backend(backend)
        backend = "torch"
    if derived and is_differentiated(uncond, cond, perturbed):
        check_backend(backend)
        return _combine_guidance(
            uncond, cond, perturbed, guidance_scale, pag_scale, rescale, "torch", rescale_mode
        )
    backend = resolve_backend(backend, cond, unfit=_unfit, default="triton")
    if torch.compiler.is_compiling():
        return reference.combine_guidance(
            uncond, cond, perturbed, guidance_scale, pag_scale, rescale, rescale_mode
        )
    op = torch.ops.pag_fast.combine_guidance.default
    run = _combine_guidance if is_unwatched(cond) else op
    return run(uncond, cond, perturbed, guidance_scale, pag_scale, rescale, backend, rescale_mode)


def _unfit(cond: torch.Tensor) -> str | None:
    if cond.ndim > 1:
        return too_large(cond)
    return f"the kernel takes predictions [samples, ...], not of shape {tuple(cond.shape)}"


def check_rescale_mode(mode: str) -> None:
    """Raises ValueError for an unknown name."""
    if mode not in reference.RESCALE_MODES:
        known = ", ".join(map(repr, reference.RESCALE_MODES))
        raise ValueError(f"Unknown rescale_mode {mode!r}: choose one of {known}.")


def _check_pictures(cond: torch.Tensor, rescale: float) -> None:
    if rescale:
        raise ValueError(f"rescale_mode='snf' has no strength: leave rescale={rescale!r} out.")
    if cond.ndim < 4 or min(cond.shape[-2:]) < 2:
        raise ValueError(
            "rescale_mode='snf' looks at the neighbours of a pixel: it takes latents "
            f"[batch, channels, height, width] or of frames of at least 2 × 2; got "
            f"{tuple(cond.shape)}. The other modes take any shape."
        )


def _combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float,
    pag_scale: float,
    rescale: float,
    backend: str,
    rescale_mode: str = "cfg",
) -> torch.Tensor:
    if rescale_mode == "snf":
        out = reference.combine_guidance(
            uncond, cond, perturbed, guidance_scale, pag_scale, rescale_mode="snf"
        )
        return _own(out, cond)
    if backend == "triton":
        from pag_fast_kernels import combine_guidance as kernel

        return kernel(
            None if uncond is None else flat_samples(uncond),
            flat_samples(cond),
            None if perturbed is None else flat_samples(perturbed),
            guidance_scale=guidance_scale,
            pag_scale=pag_scale,
            rescale=rescale,
            rescale_mode=rescale_mode,
        )
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    # lerp and the scaled add: three launches where the formula as it is written takes six
    out = c if uncond is None else torch.lerp(uncond.to(wide), c, guidance_scale)
    if perturbed is not None:
        difference = c - perturbed.to(wide)
        if rescale and rescale_mode in ("full", "partial"):
            base = out if rescale_mode == "full" else c
            reached = torch.add(base, difference, alpha=pag_scale)
            factor = reference.rescale_factor(reached, c, rescale)
            return _own(torch.addcmul(out, difference, factor * pag_scale), cond)
        out = torch.add(out, difference, alpha=pag_scale)
    if rescale and rescale_mode == "cfg":
        out = reference.rescale_to(out, c, rescale)
    return _own(out, cond)


def _own(out: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """``out`` as the op returns it."""
    # an op may not return its input: CFG off without a perturbed branch leaves cond as it is; and
    # the layout is the fake's, whatever the branches' is
    out = out.to(cond.dtype).contiguous()
    return out.clone() if out is cond else out


def flat_samples(x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous samples, as a slice of a batch and of its channels has them already."""
    # a batch of none has no sample to look at, and is contiguous
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


def _fake(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float,
    pag_scale: float,
    rescale: float,
    backend: str,
    rescale_mode: str = "cfg",
) -> torch.Tensor:
    return cond.new_empty(cond.shape)


define(
    "combine_guidance(Tensor? uncond, Tensor cond, Tensor? perturbed, float guidance_scale, "
    'float pag_scale, float rescale, str backend, str rescale_mode="cfg") -> Tensor',
    _combine_guidance,
    _fake,
)
