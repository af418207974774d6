"""PSNR, SSIM and prompt accuracy against values worked out by hand, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from pag_fast.tools.metrics import NearestPicture, decibels, prompt_accuracy, psnr, ssim


def _pictures(n=4, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_psnr_of_a_known_difference():
    reference = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-5)
    assert psnr(reference + 0.001, reference) == pytest.approx(60.0, abs=1e-3)
    assert psnr(reference, reference) == math.inf


def test_psnr_sees_less_than_a_rounding_step():
    """8-bit pictures would be equal; fp32 ones are 100 dB apart."""
    reference = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    assert psnr(reference + 1e-5, reference) == pytest.approx(100.0, abs=1e-6)


def test_ssim_of_flat_pictures():
    """Without contrast only the luminance term (2ab + c) / (a² + b² + c) is left, c = 0.01²."""
    a, b, c = 0.5, 0.4, 0.01**2
    one, other = torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b)
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert ssim(one, other) == pytest.approx(expected, abs=1e-6)


def test_ssim_falls_with_noise():
    pictures = _pictures(2, 32)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    values = [ssim((pictures + s * noise).clamp(0, 1), pictures) for s in (0.0, 0.05, 0.2)]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[2] > 0


@pytest.mark.parametrize("metric", [psnr, ssim, decibels])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="cannot be compared"):
        metric(_pictures(2), _pictures(3))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_is_no_picture_is_a_sentence(metric):
    right = torch.rand(1, 3, 16, 16)
    bytes_ = (right * 255).to(torch.uint8)
    for wrong in (bytes_, right.numpy(), [right], None, right > 0.5):
        for pair in ((wrong, right), (right, wrong), (wrong, wrong)):
            with pytest.raises(ValueError, match=r"tensors of floating-point numbers in \[0, 1\]"):
                metric(*pair)
    for wrong in (bytes_.float(), right * 2 - 1):
        with pytest.raises(ValueError, match=r"compared in \[0, 1\]; got numbers from"):
            metric(wrong, right)


def test_nearest_picture_and_ranks():
    images = _pictures()
    known = NearestPicture("abcd", images)
    assert known.nearest(images) == list("abcd")
    assert known.ranks(images, "abcd") == [0, 0, 0, 0]
    # nearly b: asked for something else, that one comes after b
    nearly = (0.9 * images[1] + 0.1 * images[2])[None]
    assert known.nearest(nearly) == ["b"]
    assert known.ranks(nearly, ["c"]) == [1]
    assert known.ranks(nearly, ["a"])[0] > 1
    with pytest.raises(ValueError, match="No known picture is called 'e'"):
        known.ranks(nearly, ["e"])
    with pytest.raises(ValueError, match="caption of its own"):
        NearestPicture("aabc", images)


class _Painter:
    """A pipeline that paints what it is asked for, but for one prompt the next picture."""

    def __init__(self, known, wrong):
        self.known, self.wrong, self.calls = known, wrong, []

    def __call__(self, prompt, *, generator, output_type, **call):
        assert output_type == "pt"
        assert len({g.initial_seed() for g in generator}) == len(prompt)
        self.calls.append((list(prompt), [g.initial_seed() for g in generator], call))
        names = [("b" if p == self.wrong else p) for p in prompt]
        images = torch.stack([self.known["abcd".index(name)] for name in names])
        return type("Output", (), {"images": images})


def test_prompt_accuracy_counts_every_prompt_and_seed():
    images = _pictures()
    pipe, seen = _Painter(images, wrong="a"), []
    known = NearestPicture("abcd", images)
    found = prompt_accuracy(pipe, known, "abcd", batch=3, progress=seen.append, pag_scale=3.0)
    assert (found.top1, found.top5, found.images) == (0.75, 1.0, 8)
    assert seen == [3, 3, 2]
    assert {seed for _, seeds, _ in pipe.calls for seed in seeds} == set(range(8))
    assert all(call == {"pag_scale": 3.0} for _, _, call in pipe.calls)
    with pytest.raises(ValueError, match="at least one caption"):
        prompt_accuracy(pipe, known, [])
