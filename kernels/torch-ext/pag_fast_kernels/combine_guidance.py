"""uncond + g·(cond − uncond) + s·(cond − perturbed), rescaled, in one or two launches.

Rescale (Lin et al., arXiv 2305.08891, section 3.4) needs the standard deviation of each sample of
cond and of the prediction, or of cond plus the PAG term where that alone is rescaled. The first
launch reduces chunks of a sample to mean and sum of squared deviations, the second merges them
(Chan et al. 1983: no cancellation, and the same result in every run) and writes the prediction.
Nothing is stored in between but 4 numbers a chunk.

Floor, for E elements of s bytes in each branch, b branches:

    bytes  s·E·(b + 1)      with rescale s·E·(2·b + 1), the second reading from L2 if it fits
    FLOPs  5·E
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, stride_unit

# elements of a program: small ones fill the chip, but each reads the moments of all of its sample
CHUNK, LARGE_CHUNK = 1024, 4096
LARGE = 1 << 20  # elements of a sample


@triton.jit
def _combined(u_ptr, c_ptr, p_ptr, offsets, mask, stride_u, stride_c, stride_p, sample, g, s,
              HAS_U: tl.constexpr, HAS_P: tl.constexpr):  # fmt: skip
    """The prediction without PAG, PAG's term and cond, fp32."""
    c = tl.load(c_ptr + sample * stride_c + offsets, mask=mask, other=0.0).to(tl.float32)
    out = c
    term = tl.zeros_like(c)
    if HAS_U:
        u = tl.load(u_ptr + sample * stride_u + offsets, mask=mask, other=0.0).to(tl.float32)
        out = u + g * (c - u)
    if HAS_P:
        p = tl.load(p_ptr + sample * stride_p + offsets, mask=mask, other=0.0).to(tl.float32)
        term = s * (c - p)
    return out, term, c


@triton.jit
def _moments(x, mask, count):
    """Mean and sum of squared deviations of the ``count`` elements under ``mask``."""
    mean = tl.sum(tl.where(mask, x, 0.0), 0) / count
    deviation = tl.where(mask, x - mean, 0.0)
    return mean, tl.sum(deviation * deviation, 0)


_INTEGERS = ("stride_u", "stride_c", "stride_p", "numel", "chunks")


@triton.jit(do_not_specialize=_INTEGERS[:-1])
def _guidance_moments_kernel(
    u_ptr,  # [samples, numel], unit stride within a sample
    c_ptr,
    p_ptr,
    moments_ptr,  # [samples, chunks, 4] fp32: mean and squared deviations of prediction and cond
    g,
    s,
    stride_u,  # these in units of UNIT elements
    stride_c,
    stride_p,
    numel,
    UNIT: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    # multiples of a constant: masks and addresses change on 16 bytes
    stride_u *= UNIT
    stride_c *= UNIT
    stride_p *= UNIT
    numel *= UNIT
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    out, term, c = _combined(
        u_ptr, c_ptr, p_ptr, offsets, mask, stride_u, stride_c, stride_p, sample, g, s, HAS_U, HAS_P
    )
    out += term
    count = tl.minimum(numel - chunk * BLOCK, BLOCK).to(tl.float32)
    out_mean, out_squares = _moments(out, mask, count)
    c_mean, c_squares = _moments(c, mask, count)
    base = moments_ptr + (sample * tl.num_programs(0) + chunk) * 4
    tl.store(base, out_mean)
    tl.store(base + 1, out_squares)
    tl.store(base + 2, c_mean)
    tl.store(base + 3, c_squares)


@triton.jit
def _merged_squares(base, index, counts, present, numel):
    """Sum of squared deviations of a whole sample from those of its chunks."""
    means = tl.load(base + index * 4, mask=present, other=0.0)
    squares = tl.load(base + index * 4 + 1, mask=present, other=0.0)
    mean = tl.sum(means * counts, 0) / numel
    between = (means - mean) * (means - mean) * counts
    return tl.sum(squares + tl.where(present, between, 0.0), 0)


@triton.jit(do_not_specialize=_INTEGERS)
def _combine_guidance_kernel(
    u_ptr,  # [samples, numel], unit stride within a sample
    c_ptr,
    p_ptr,
    out_ptr,  # [samples, numel], contiguous
    moments_ptr,
    g,
    s,
    rescale,
    stride_u,  # these in units of UNIT elements
    stride_c,
    stride_p,
    numel,
    chunks,
    UNIT: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_P: tl.constexpr,
    RESCALE: tl.constexpr,
    TERM_ONLY: tl.constexpr,  # rescale PAG's term, not the sum
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    # multiples of a constant: masks and addresses change on 16 bytes
    stride_u *= UNIT
    stride_c *= UNIT
    stride_p *= UNIT
    numel *= UNIT
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    out, term, c = _combined(
        u_ptr, c_ptr, p_ptr, offsets, mask, stride_u, stride_c, stride_p, sample, g, s, HAS_U, HAS_P
    )
    if RESCALE:
        index = tl.arange(0, BLOCK_CHUNKS)
        present = index < chunks
        counts = tl.where(present, tl.minimum(numel - index * BLOCK, BLOCK), 0).to(tl.float32)
        base = moments_ptr + sample * chunks * 4
        out_squares = _merged_squares(base, index, counts, present, numel)
        c_squares = _merged_squares(base + 2, index, counts, present, numel)
        # both have numel − 1 below: it cancels
        factor = rescale * tl.sqrt(c_squares / out_squares) + (1.0 - rescale)
        out = out + factor * term if TERM_ONLY else factor * (out + term)
    else:
        out += term
    tl.store(out_ptr + sample * numel + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch_moments = Launcher(_guidance_moments_kernel)
_launch = Launcher(_combine_guidance_kernel)


def combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    *,
    guidance_scale: float,
    pag_scale: float,
    rescale: float = 0.0,
    rescale_mode: str = "cfg",
) -> torch.Tensor:
    """The prediction [samples, …], contiguous, in cond's dtype; sums in fp32.

    ``rescale_mode`` says what ``rescale`` applies to: "cfg", to the sum; "full" and "partial", to
    PAG's term, by the standard deviation of the sum or of cond with the term.

    Branches are [samples, …] with unit stride inside a sample, as slices of a batch and of its
    channels are: learned sigma channels are skipped by not being in the slice.
    """
    samples = len(cond)
    numel = cond.numel() // max(1, samples)
    out = torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)
    chunk, warps = (CHUNK, 4) if numel <= LARGE else (LARGE_CHUNK, 16)
    chunks = triton.cdiv(numel, chunk)
    # an absent branch needs some pointer: it is never read
    u, p = cond if uncond is None else uncond, cond if perturbed is None else perturbed
    term_only = rescale_mode != "cfg"
    if term_only and perturbed is None:
        rescale = 0.0
    has_u, has_p = uncond is not None, perturbed is not None
    strides = u.stride(0), cond.stride(0), p.stride(0)
    starts_aligned = aligned(u, cond, p, out)

    def prepare(more: tuple[int, ...], **flags: int) -> Prepared:
        unit = stride_unit(cond, (*strides, numel), starts_aligned)
        integers = *(x // unit for x in (*strides, numel)), *more
        return (chunks, samples), integers, {"UNIT": unit, **flags}, {"num_warps": warps}

    moments = out
    if rescale:
        moments = torch.empty((samples, chunks, 4), dtype=torch.float32, device=cond.device)
    key = None
    if starts_aligned and aligned(moments):
        key = cond.device.index, cond.shape, strides, has_u, has_p
        key = *key, bool(rescale), rescale_mode
    numbers = float(guidance_scale), float(pag_scale)
    if rescale:
        reads_u = has_u and rescale_mode != "partial"
        flags = {"HAS_U": reads_u, "HAS_P": has_p, "BLOCK": chunk}
        _launch_moments(key, (u, cond, p, moments), numbers, lambda: prepare((), **flags))
    flags = {
        "HAS_U": has_u,
        "HAS_P": has_p,
        "RESCALE": bool(rescale),
        "TERM_ONLY": bool(rescale) and term_only,
        "BLOCK": chunk,
        "BLOCK_CHUNKS": triton.next_power_of_2(chunks),
    }
    numbers = *numbers, float(rescale)
    _launch(key, (u, cond, p, out, moments), numbers, lambda: prepare((chunks,), **flags))
    return out
