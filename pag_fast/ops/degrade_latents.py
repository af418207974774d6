"""Self-Attention Guidance's degradation: predict x₀, blur what is salient, add the noise again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .autocast import without_autocast
from .backend import (
    check_backend,
    define,
    is_differentiated,
    is_unwatched,
    resolve_backend,
    too_large,
)
from .combine_guidance import flat_samples


def degrade_latents(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    *,
    map_size: tuple[int, int],
    clean: tuple[float, float],
    noise: tuple[float, float],
    backend: str = "auto",
) -> torch.Tensor:
    """Latents with their salient parts blurred: one launch with Triton, ten with PyTorch.

    Arguments and dtypes: :func:`pag_fast.ops.reference.degrade_latents`. The kernel has one blur
    for all channels: it takes one that is expanded over them, as ``gaussian_kernel`` makes it.
    Weights are Python floats, so that no step waits for the device.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    _check(sample, model_output, received, blur, map_size)
    tensors = sample, model_output, received, blur
    derived = forward_ad._current_level >= 0
    for x in tensors:
        derived = derived or x.requires_grad
    if derived and is_differentiated(*tensors):
        check_backend(backend)
        with without_autocast(sample.device.type):
            return torch_degrade_latents(
                sample, model_output, received, blur, map_size, clean, noise
            )

    def unfit(sample: torch.Tensor) -> str | None:
        # numbers would have to be read off the device
        if blur.shape[0] > 1 and blur.stride(0):
            return (
                "the kernel has one blur for all channels, which shows where it is expanded over "
                "them, as gaussian_kernel makes it"
            )
        return too_large(sample)

    backend = resolve_backend(backend, sample, unfit=unfit, default="triton")
    op = torch.ops.pag_fast.degrade_latents.default
    run = _degrade_latents if is_unwatched(sample) else op
    with without_autocast(sample.device.type):
        return run(sample, model_output, received, blur, *map_size, *clean, *noise, backend)


def _check(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    map_size: tuple[int, int],
) -> None:
    if sample.ndim != 4 or model_output.shape != sample.shape:
        raise ValueError(
            "degrade_latents takes latents and model output of one shape [batch, channels, height, "
            f"width]; got {tuple(sample.shape)} and {tuple(model_output.shape)}."
        )
    for x in (sample, model_output, received, blur):
        if not x.dtype.is_floating_point:
            raise ValueError(f"degrade_latents takes floating-point tensors; one is {x.dtype}.")
    batch, channels, height, width = sample.shape
    expected = batch, map_size[0] * map_size[1]
    if received.shape != expected:
        raise ValueError(
            f"received must have shape {expected}, batch by tokens of a {map_size[0]} × "
            f"{map_size[1]} map; got {tuple(received.shape)}."
        )
    size = blur.shape[-1] if blur.ndim else 0
    if blur.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"blur must have shape ({channels}, 1, K, K) with K odd; got {tuple(blur.shape)}."
        )
    if size // 2 >= min(height, width):
        raise ValueError(
            f"Latents of {height} × {width} are too small for a blur of {size} × {size}, whose "
            f"borders are reflected: {size // 2 + 1} in each direction is the least."
        )


def torch_degrade_latents(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    map_size: tuple[int, int],
    clean: tuple[float, float],
    noise: tuple[float, float],
) -> torch.Tensor:
    """The PyTorch backend of :func:`degrade_latents`."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    x, output = sample.to(wide), model_output.to(wide)
    original = torch.add(x * clean[0], output, alpha=clean[1])
    border = blur.shape[-1] // 2
    padded = F.pad(original, (border,) * 4, mode="reflect")
    # 81 products a pixel in one launch: a separable blur would take two
    blurred = F.conv2d(padded, blur.to(wide), groups=x.shape[1])
    salient = F.interpolate(received.unflatten(1, (1, *map_size)), x.shape[-2:]) > 1.0
    out = torch.where(salient, blurred, original)
    if noise[0]:
        out = out.add_(x, alpha=noise[0])
    return out.add_(output, alpha=noise[1]).to(sample.dtype).contiguous()


def _degrade_latents(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    map_height: int,
    map_width: int,
    clean_sample: float,
    clean_output: float,
    noise_sample: float,
    noise_output: float,
    backend: str,
) -> torch.Tensor:
    map_size = map_height, map_width
    clean, noise = (clean_sample, clean_output), (noise_sample, noise_output)
    if backend == "torch":
        return torch_degrade_latents(sample, model_output, received, blur, map_size, clean, noise)
    from pag_fast_kernels import degrade_latents as kernel

    return kernel(
        flat_samples(sample),
        flat_samples(model_output),
        received.contiguous(),
        blur[:1].contiguous(),
        map_size=map_size,
        clean=clean,
        noise=noise,
    )


define(
    "degrade_latents(Tensor sample, Tensor model_output, Tensor received, Tensor blur, "
    "SymInt map_height, SymInt map_width, float clean_sample, float clean_output, "
    "float noise_sample, float noise_output, str backend) -> Tensor",
    _degrade_latents,
    lambda sample, *_: sample.new_empty(sample.shape),
)


@register_flop_formula(torch.ops.pag_fast.degrade_latents)
def _(sample, model_output, received, blur, *args, out_shape=None, **_):  # type: ignore[no-untyped-def]
    batch, channels, height, width = sample
    return 2 * batch * channels * height * width * blur[-1] * blur[-2]
