"""The Triton kernel of ``degrade_latents`` in the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch
from pag_fast_kernels import degrade_latents
from test_degrade_latents import SHAPES, _arguments, _truth

from pag_fast import ops
from pag_fast.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], (2, 3, 20, 31, 3, 4)], ids=str)
def test_against_fp64(shape, dtype, launches):  # noqa: F811
    tensors, rest = _arguments(shape, dtype)
    out = degrade_latents(*tensors, **rest)
    assert_close_as_torch(out, reference.degrade_latents(*tensors, **rest), _truth(tensors, rest))
    assert launches == ["_degrade_latents_kernel"]


@pytest.mark.parametrize("size", [1, 5])
def test_rows_of_a_guided_batch_in_any_layout(size, launches):  # noqa: F811
    """uncond's part of the model's output, channels last; blurs of other sizes."""
    (sample, _, received, _), rest = _arguments((3, 3, 6, 7, 3, 4), torch.float32)
    rows = torch.randn(6, *sample.shape[1:]).to(memory_format=torch.channels_last)
    blur = reference.gaussian_kernel(3, size)
    tensors = [sample, rows[:3], received, blur]
    out = ops.degrade_latents(*tensors, **rest, backend="triton")
    assert out.is_contiguous()
    assert_close_as_torch(out, reference.degrade_latents(*tensors, **rest), _truth(tensors, rest))


@pytest.mark.parametrize("latent", [5, 7, 9, 12, 13, 24, 31])
def test_nearest_neighbours_are_pytorchs(latent, launches):  # noqa: F811
    """Map tokens alternate: one pixel taken from a neighbour shows."""
    for tokens in (2, 3, 5, 6, 7):
        received = (torch.arange(tokens * tokens).view(1, -1) % 2) * 2.0
        sample, zeros = torch.randn(2, 1, 1, latent, latent)
        blur = torch.full((1, 1, 1, 1), 2.0)
        arguments = {"map_size": (tokens, tokens), "clean": (1.0, 0.0), "noise": (0.0, 0.0)}
        out = degrade_latents(sample, zeros, received, blur, **arguments)
        mask = F.interpolate(received.view(1, 1, tokens, tokens), (latent, latent)) > 1
        assert torch.equal(out != sample, mask), tokens


def test_weights_reach_the_kernel_as_they_are(launches):  # noqa: F811
    tensors, rest = _arguments(SHAPES[0], torch.float32)
    tensors[3] = reference.gaussian_kernel(4, 3)
    for clean, noise in (((1, 0), (0, 0)), ((0, 1), (0, 0)), ((0, 0), (1, 0)), ((0, 0), (0, 1))):
        arguments = {**rest, "clean": clean, "noise": noise}
        out = degrade_latents(*tensors, **arguments)
        assert torch.allclose(out, reference.degrade_latents(*tensors, **arguments), atol=1e-6)
