"""Context parallelism: two processes make the picture of one, or say why not."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
from processes import on_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers is older"
)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
def test_two_processes_make_the_picture_of_one(name: str, tmp_path: Path) -> None:
    """Every perturbation, Ulysses and ring, sequences of all lengths, with CFG and without."""
    for found in on_ranks(tmp_path, "context_cases", "exact", name):
        assert len(found) == 8 + 7 * 3
        assert max(error for error, _ in found.values()) < 1e-5, found
        assert min(effect for _, effect in found.values()) > 1e-2
