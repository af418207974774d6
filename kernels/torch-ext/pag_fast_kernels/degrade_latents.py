"""Self-Attention Guidance's degradation of latents (Hong et al., arXiv 2210.00939), in one launch.

    x₀ = c₁·x + c₂·m                   what the model's output m makes of the latents x
    out = (received > 1 ? blur(x₀) : x₀) + n₁·x + n₂·m

The weights hold the prediction type, and the noise level at which noise is added again: the blur
is linear, so x₀ can be scaled before it. Every pixel takes the K × K products itself. Neighbours
read the same pixels, from the cache, and there are 16 thousand of them: nothing is gained from two
passes with one launch each.

Floor, for E elements of s bytes, a blur of K × K, a map of M tokens:

    bytes  3·s·E + 4·M     x and m read once, the output
    FLOPs  (5·K² + 8)·E    x₀ of every neighbour anew; 4·K + 8 in two passes
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned
from .launch import INTERPRETED

# elements of a program; the interpreter's time is per program
BLOCK, INTERPRETED_BLOCK = 256, 2048


@triton.jit
def _reflected(index, size):
    """Border pixels are mirrored at the last row or column, which is not repeated."""
    index = tl.where(index < 0, -index, index)
    return tl.where(index >= size, 2 * (size - 1) - index, index)


_INTEGERS = (
    *("stride_x", "stride_output", "channels"),
    *("height", "width", "map_height", "map_width"),
)


@triton.jit(do_not_specialize=_INTEGERS)
def _degrade_latents_kernel(
    x_ptr,  # [B, C, height, width], contiguous samples
    output_ptr,
    received_ptr,  # [B, map_height, map_width] fp32, contiguous
    blur_ptr,  # [KERNEL, KERNEL] fp32
    out_ptr,  # [B, C, height, width], contiguous
    scale_y,
    scale_x,
    clean_x,
    clean_output,
    noise_x,
    noise_output,
    stride_x,
    stride_output,
    channels,
    height,
    width,
    map_height,
    map_width,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numel = channels * height * width
    mask = elements < numel
    y, x = elements // width % height, elements % width
    # the channel's first pixel
    first = elements - y * width - x
    x_base = x_ptr + sample * stride_x
    output_base = output_ptr + sample * stride_output
    blurred = tl.zeros((BLOCK,), tl.float32)
    for down in range(KERNEL):
        line = first + _reflected(y + down - KERNEL // 2, height) * width
        for right in tl.static_range(KERNEL):
            near = line + _reflected(x + right - KERNEL // 2, width)
            latent = tl.load(x_base + near, mask=mask, other=0.0).to(tl.float32)
            predicted = tl.load(output_base + near, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(blur_ptr + down * KERNEL + right)
            blurred += weight * (clean_x * latent + clean_output * predicted)
    latent = tl.load(x_base + elements, mask=mask, other=0.0).to(tl.float32)
    predicted = tl.load(output_base + elements, mask=mask, other=0.0).to(tl.float32)
    original = clean_x * latent + clean_output * predicted
    # PyTorch's nearest neighbour, rounding included
    map_y = tl.minimum((y.to(tl.float32) * scale_y).to(tl.int32), map_height - 1)
    map_x = tl.minimum((x.to(tl.float32) * scale_x).to(tl.int32), map_width - 1)
    token = (sample * map_height + map_y) * map_width + map_x
    received = tl.load(received_ptr + token, mask=mask, other=0.0)
    out = tl.where(received > 1.0, blurred, original)
    out += noise_x * latent + noise_output * predicted
    base = out_ptr + sample * numel
    tl.store(base + elements, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_degrade_latents_kernel)


def degrade_latents(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    *,
    map_size: tuple[int, int],
    clean: tuple[float, float],
    noise: tuple[float, float],
) -> torch.Tensor:
    """The degraded latents [B, C, height, width], contiguous, in the dtype of ``sample``.

    ``sample`` and ``model_output`` [B, C, height, width] have contiguous samples. ``received`` is
    fp32 [B, tokens] of a map of ``map_size``, contiguous; ``blur`` fp32 [1, 1, K, K], contiguous,
    of every channel, K odd and at most twice the smaller side of the latents less one.
    ``clean`` and ``noise`` are the weights of ``sample`` and ``model_output`` in x₀ and in the
    noise.
    """
    batch, channels, height, width = sample.shape
    block = INTERPRETED_BLOCK if INTERPRETED else BLOCK
    out = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    strides = sample.stride(0), model_output.stride(0)

    def prepare() -> Prepared:
        grid = (triton.cdiv(channels * height * width, block), batch)
        constants = {"KERNEL": blur.shape[-1], "BLOCK": block}
        return grid, (*strides, channels, height, width, *map_size), constants, {}

    pointers = sample, model_output, received, blur, out
    key = None
    if aligned(*pointers):
        key = sample.device.index, sample.shape, strides, map_size, blur.shape[-1]
    scales = map_size[0] / height, map_size[1] / width
    _launch(key, pointers, (*scales, *map(float, clean), *map(float, noise)), prepare)
    return out
