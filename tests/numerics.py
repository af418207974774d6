"""The one rule for tolerances: no worse than twice PyTorch in the same dtype, against fp64."""

from __future__ import annotations

import torch


def max_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference to ``truth`` (fp64)."""
    return (out.double() - truth).abs().max().item()


def assert_close_as_torch(
    out: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor
) -> None:
    """``out`` errs at most 2 × as much as PyTorch in the same dtype, plus one rounding step."""
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(out).all(), "output holds NaN or inf: some of it was never written"
    ours, torchs = max_error(out, truth), max_error(same_dtype, truth)
    floor = torch.finfo(out.dtype).eps * truth.abs().max().item()
    assert ours <= 2 * torchs + floor, f"error {ours:.3e}, PyTorch {torchs:.3e}, floor {floor:.3e}"


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``expected``."""
    expected = expected.double()
    return ((out.double() - expected).norm() / expected.norm()).item()
