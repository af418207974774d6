"""How close pictures are to stock's, and to what was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite for equal ones.

    Any shape, the same for both; computed in fp64. Differences below 8-bit rounding count: quantise
    nothing before.

    Raises:
        ValueError: the shapes differ, or these are no pictures in [0, 1].
    """
    _check(image, reference)
    return decibels(image, reference)


def decibels(image: torch.Tensor, reference: torch.Tensor) -> float:
    """As :func:`psnr`, of numbers in any range of width one: latents, for example.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(image, reference)
    error = (image.double() - reference.double()).square().mean().item()
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of pictures (n, 3, H, W) in [0, 1].

    Gaussian window of 11 × 11, σ = 1.5. Computed by torchmetrics (``pip install
    'pag-fast[metrics]'``).

    Raises:
        ValueError: the shapes differ or are not (n, 3, H, W), or these are no pictures in [0, 1].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(image, reference)
    if image.ndim != 4:
        raise ValueError(f"ssim takes pictures of shape (n, 3, H, W); got {tuple(image.shape)}.")
    value = structural_similarity_index_measure(
        image.double(), reference.double(), data_range=1.0, kernel_size=11, sigma=1.5
    )
    assert isinstance(value, torch.Tensor)
    return value.item()


def _check(image: Any, reference: Any) -> None:
    for found in (image, reference):
        is_tensor = isinstance(found, torch.Tensor)
        if not is_tensor or not found.is_floating_point():
            kind = f"a tensor of {found.dtype}" if is_tensor else f"a {type(found).__name__}"
            raise ValueError(
                "Pictures are compared as tensors of floating-point numbers in [0, 1]; got "
                f"{kind}. Convert what has 8 bits: torch.from_numpy(numpy.array(picture)) / 255."
            )
        if found.numel() and (found.min() < 0 or found.max() > 1):
            raise ValueError(
                f"Pictures are compared in [0, 1]; got numbers from {found.min().item():.4g} to "
                f"{found.max().item():.4g}. Divide those of 8 bits by 255; of those from -1 to 1 "
                "take (x + 1) / 2."
            )
    _check_shapes(image, reference)


def _check_shapes(image: torch.Tensor, reference: torch.Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(
            f"Pictures of shape {tuple(image.shape)} cannot be compared with pictures of shape "
            f"{tuple(reference.shape)}."
        )


class NearestPicture:
    """Tells which of the known pictures an image shows: the nearest in pixel space.

    The distance is the squared difference summed over all pixels and channels, fp32.
    """

    def __init__(self, captions: Sequence[str], images: torch.Tensor) -> None:
        if len(captions) != len(images) or len(set(captions)) != len(captions):
            raise ValueError(
                f"Every picture needs a caption of its own; got {len(images)} pictures and "
                f"{len(set(captions))} different captions."
            )
        self.captions = list(captions)
        self._known = images.flatten(1).float()
        self._index = {caption: i for i, caption in enumerate(captions)}

    def nearest(self, images: torch.Tensor) -> list[str]:
        """The caption of the nearest known picture for each of ``images`` (n, 3, H, W)."""
        return [self.captions[i] for i in self._distances(images).argmin(dim=1).tolist()]

    def ranks(self, images: torch.Tensor, captions: Sequence[str]) -> list[int]:
        """For each image, how many known pictures are nearer than the one that was asked for.

        Raises:
            ValueError: a caption that no known picture has.
        """
        unknown = [caption for caption in captions if caption not in self._index]
        if unknown:
            raise ValueError(f"No known picture is called {unknown[0]!r}.")
        distances = self._distances(images)
        asked = torch.tensor([self._index[c] for c in captions], device=distances.device)
        own = distances.gather(1, asked[:, None])
        return (distances < own).sum(dim=1).tolist()

    def _distances(self, images: torch.Tensor) -> torch.Tensor:
        known = self._known.to(images.device)
        return torch.cdist(
            images.flatten(1).float(), known, compute_mode="donot_use_mm_for_euclid_dist"
        )


@dataclass(frozen=True)
class Accuracy:
    """Share of ``images`` pictures whose nearest (five nearest) known pictures is as asked."""

    top1: float
    top5: float
    images: int


def prompt_accuracy(
    pipe: Any,
    known: NearestPicture,
    captions: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1),
    batch: int = 32,
    prompt_weight: float = 1.0,
    progress: Any = None,
    **call: Any,
) -> Accuracy:
    """Generate every caption with every seed; how often is the picture the one asked for?

    Args:
        pipe: a text-to-image pipeline, patched or not.
        known: pictures to tell apart, see :func:`pag_fast.tools.load.emoji_pictures`.
        batch: prompts per call. Each image has a generator of its own, so that its noise does not
            depend on it.
        prompt_weight: see :func:`generate`.
        progress: called with the number of images after every batch.
        call: further arguments of the pipeline's call.
    """
    if not captions or not seeds:
        raise ValueError("prompt_accuracy needs at least one caption and one seed.")
    # every picture starts from noise of its own
    jobs = [(c, seed * len(captions) + i) for seed in seeds for i, c in enumerate(captions)]
    ranks: list[int] = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        images = generate(pipe, part, prompt_weight=prompt_weight, **call)
        ranks += known.ranks(images, [caption for caption, _ in part])
        if progress is not None:
            progress(len(part))
    count = len(ranks)
    return Accuracy(sum(r < 1 for r in ranks) / count, sum(r < 5 for r in ranks) / count, count)


def generate(
    pipe: Any, jobs: Sequence[tuple[str, int]], *, prompt_weight: float = 1.0, **call: Any
) -> torch.Tensor:
    """Pictures (n, 3, H, W) in [0, 1], fp32, for pairs of prompt and seed, in one batch.

    Args:
        prompt_weight: below 1 the prompt is asked for faintly: its embedding is that far from the
            empty prompt's. What guidance does shows where a full prompt would leave nothing to
            improve. For pipelines of Stable Diffusion 1.5's kind, with one embedding.
    """
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    prompts = [prompt for prompt, _ in jobs]
    if prompt_weight == 1.0:
        text: dict[str, Any] = {"prompt": prompts}
    else:
        with torch.no_grad():
            full, empty = pipe.encode_prompt(prompts, pipe.device, 1, True)
        text = {
            "prompt_embeds": torch.lerp(empty, full, prompt_weight),
            "negative_prompt_embeds": empty,
        }
    return pipe(**text, generator=generators, output_type="pt", **call).images.float()
