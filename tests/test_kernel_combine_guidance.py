"""The Triton kernels of ``combine_guidance`` in the interpreter, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch
from pag_fast_kernels import combine_guidance
from pag_fast_kernels.launch import INTERPRETED

from pag_fast.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BRANCHES = {"cfg and pag": "ucp", "cfg": "uc", "pag": "cp", "neither": "c"}


def _with_all(*shapes):
    """Every combination of branches at a length that no block divides; all of them at others."""
    return [
        *(pytest.param(which, (2, 3, 17, 41), id=name) for name, which in BRANCHES.items()),
        *(pytest.param("ucp", shape, id=str(shape)) for shape in shapes),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("which", "shape"), _with_all((1, 4, 8, 8), (2, 4, 3, 16, 24)))
def test_against_fp64(dtype, rescale, which, shape, launches):  # noqa: F811
    branches = {name: torch.randn(shape).to(dtype) for name in which}
    inputs = [branches.get(name) for name in "ucp"]
    wide = [None if x is None else x.double() for x in inputs]
    out = combine_guidance(*inputs, guidance_scale=7.0, pag_scale=3.0, rescale=rescale)
    assert len(launches) == (2 if rescale else 1)
    assert out.is_contiguous()
    truth = reference.combine_guidance(*wide, 7.0, 3.0, rescale)
    assert_close_as_torch(out, reference.combine_guidance(*inputs, 7.0, 3.0, rescale), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize(("which", "shape"), _with_all((2, 70, 16)))
def test_rescaling_the_term_alone(dtype, mode, which, shape, launches):  # noqa: F811
    branches = {name: torch.randn(shape).to(dtype) for name in which}
    inputs = [branches.get(name) for name in "ucp"]
    wide = [None if x is None else x.double() for x in inputs]
    scales = {"guidance_scale": 7.0, "pag_scale": 3.0, "rescale": 0.7, "rescale_mode": mode}
    out = combine_guidance(*inputs, **scales)
    # without a perturbed branch there is nothing to rescale
    assert len(launches) == (2 if "p" in which else 1)
    truth = reference.combine_guidance(*wide, **scales)
    assert_close_as_torch(out, reference.combine_guidance(*inputs, **scales), truth)


def test_large_samples(launches, monkeypatch):  # noqa: F811
    """As of a video: larger pieces, or every program would read thousands of moments."""
    shape = 1, 4, 2, 400, 401
    if INTERPRETED:  # where so few count as many
        monkeypatch.setattr(sys.modules[combine_guidance.__module__], "LARGE", 1 << 15)
        shape = 1, 4, 2, 90, 91
    u, c, p = torch.randn(3, *shape).unbind()
    out = combine_guidance(u, c, p, guidance_scale=4.0, pag_scale=2.0, rescale=0.7)
    truth = reference.combine_guidance(u.double(), c.double(), p.double(), 4.0, 2.0, 0.7)
    assert_close_as_torch(out, reference.combine_guidance(u, c, p, 4.0, 2.0, 0.7), truth)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_slices_of_a_batch_with_sigma_channels(rescale, launches):  # noqa: F811
    rows = torch.randn(6, 8, 9, 7)[:, :4]
    u, c, p = rows.chunk(3)
    out = combine_guidance(u, c, p, guidance_scale=4.0, pag_scale=2.0, rescale=rescale)
    expected = reference.combine_guidance(u, c, p, 4.0, 2.0, rescale)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_rescale_does_not_cancel(launches):  # noqa: F811
    """A mean far from zero: the difference of squares would lose every digit."""
    u, c, p = (torch.randn(3, 1, 4, 64, 64) + 300).unbind()
    out = combine_guidance(u, c, p, guidance_scale=4.0, pag_scale=2.0, rescale=0.7)
    truth = reference.combine_guidance(u.double(), c.double(), p.double(), 4.0, 2.0, 0.7)
    assert_close_as_torch(out, reference.combine_guidance(u, c, p, 4.0, 2.0, 0.7), truth)
