"""Scale, window, rescaling and blur, against their definitions in fp64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

# isort: split
from comfyui.guidance import Guidance, fuse_by_saliency
from comfyui.perturbations import BlurredQueries, gaussian_blur

RANDOM = torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RANDOM, dtype=torch.float64)


def _args(shape: tuple[int, ...] = (2, 4, 8, 6)) -> dict[str, torch.Tensor]:
    return {name: _random(*shape) for name in ("cond_denoised", "denoised", "uncond_denoised")}


def test_guidance_without_rescaling_is_one_line() -> None:
    args, perturbed = _args(), _random(2, 4, 8, 6)
    out = Guidance(2.0).combine(args, perturbed, 2.0)
    assert torch.equal(out, args["denoised"] + (args["cond_denoised"] - perturbed) * 2.0)


@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (2, 16, 3, 8, 6)])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescaling_restores_the_deviation_of_cond(mode: str, shape: tuple[int, ...]) -> None:
    args, perturbed = _args(shape), _random(*shape)
    out = Guidance(rescale=0.6, rescale_mode=mode).combine(args, perturbed, 3.0)
    for i in range(2):
        cond, cfg = args["cond_denoised"][i], args["denoised"][i]
        guidance = (cond - perturbed[i]) * 3.0
        measured = (cfg if mode == "full" else cond) + guidance
        factor = 0.6 * cond.std() / measured.std() + 0.4
        assert torch.allclose(out[i], cfg + guidance * factor)


def test_snf_takes_what_stands_out_more() -> None:
    text, perturbed = _random(1, 2, 8, 8) * 0.1, _random(1, 2, 8, 8) * 0.1
    text[0, 0, 2, 2], perturbed[0, 0, 6, 6] = 50.0, 50.0
    out = fuse_by_saliency(text, perturbed)
    assert out[0, 0, 2, 2] == 50.0
    assert out[0, 0, 6, 6] == 50.0
    assert ((out == text) | (out == perturbed)).all()
    args = _args((1, 2, 8, 8))
    args["uncond_denoised"] = torch.zeros(1, 2, 8, 8)
    plain = args["denoised"] + (args["cond_denoised"] - perturbed) * 2.0
    combined = Guidance(rescale_mode="snf").combine(args, perturbed, 2.0)
    assert torch.equal(combined, plain), "without uncond nothing is fused"


def test_the_window_is_open_below_and_closed_above() -> None:
    guidance = Guidance(sigma_start=5.0, sigma_end=1.0)
    assert [guidance.active(torch.tensor([s])) for s in (5.1, 5.0, 1.1, 1.0, 0.0)] == [
        False, True, True, False, False
    ]  # fmt: skip
    assert Guidance(sigma_end=1.0).active(torch.tensor([1e9]))
    assert not Guidance(scale=0.0).active(torch.tensor([1.0]))


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_the_adaptive_scale_falls_with_the_steps_of_training(name: str) -> None:
    sampling = tiny.build(name).model.get_model_object("model_sampling")
    guidance = Guidance(scale=4.0, adaptive_scale=0.2)
    sigmas = [sampling.percent_to_sigma(percent) for percent in (0.0, 0.25, 0.5, 0.9)]
    sigmas[0] = float(sampling.sigma_max)
    scales = [guidance.scale_at(sampling, torch.tensor([float(sigma)])) for sigma in sigmas]
    assert scales == sorted(scales, reverse=True)
    assert 3.99 < scales[0] <= 4.0
    half = float(sampling.timestep(torch.tensor([float(sigmas[2])]))[0])
    half *= 1.0 if name == "sdxl" else 1000.0 / float(sampling.timestep(sampling.sigma_max))
    assert math.isclose(scales[2], max(0.0, 4.0 * (1 - 0.2**4 * (1000 - half))), rel_tol=1e-5)
    assert Guidance(scale=4.0, adaptive_scale=1.0).scale_at(sampling, torch.tensor([0.1])) == 0


@pytest.mark.parametrize("size, sigma", [(3, 1.0), (7, 1.1), (19, 3.0)])
@pytest.mark.parametrize("height, width", [(8, 8), (5, 9), (12, 3), (3, 12)])
def test_the_blur_is_a_gaussian_mirrored_at_the_edges(
    size: int, sigma: float, height: int, width: int
) -> None:
    image = _random(2, 3, height, width)
    blurred = gaussian_blur(image, size, sigma)
    # by the width, as in sd-perturbed-attention, and to what can be mirrored
    cut = min(size, width - (width % 2 - 1), 2 * min(height, width) - 1)
    taps = torch.arange(cut, dtype=torch.float64) - cut // 2
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    padded = F.pad(image, [cut // 2] * 4, mode="reflect")
    expected = torch.zeros_like(image)
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            expected += a * b * padded[:, :, i : i + height, j : j + width]
    assert torch.allclose(blurred, expected, atol=1e-6)


def test_infinite_blur_is_the_mean_and_grids_follow_the_latents() -> None:
    q, k, v = (torch.randn(1, 24, 8, generator=RANDOM) for _ in range(3))
    extra = {"n_heads": 2, "original_shape": [1, 4, 8, 12]}
    mean = BlurredQueries(-1.0)(q, k, v, extra)
    assert torch.allclose(mean, mean[:, :1].expand_as(mean), atol=1e-6)
    wide = BlurredQueries(1.0)(q, k, v, extra)
    grid = gaussian_blur(q.transpose(1, 2).reshape(1, 8, 4, 6), 7, 1.0).flatten(2).transpose(1, 2)
    heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (grid, k, v)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.allclose(wide, expected, atol=1e-6)
    tall = {**extra, "original_shape": [1, 4, 12, 8]}
    assert not torch.allclose(wide, BlurredQueries(1.0)(q, k, v, tall), atol=1e-3)
