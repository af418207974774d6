"""Tensor parallelism and FSDP2: two processes make the picture of one."""

from __future__ import annotations

import diffusers
import processes
import pytest
import weight_cases


@pytest.mark.skipif(not hasattr(diffusers, "TensorParallelConfig"), reason="diffusers is older")
@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_tensor_parallelism(name: str) -> None:
    """Every perturbation, in whichever order a pipeline is patched and its heads are shared out."""
    for found in processes.run(2, weight_cases.tensor, name):
        assert len(found) == (8 if name == "FluxPipeline" else 3) + 2
        assert max(error for error, _ in found.values()) < 1e-5, found
        assert min(effect for _, effect in found.values()) > 1e-2


@pytest.mark.skipif(not hasattr(diffusers, "TensorParallelConfig"), reason="diffusers is older")
def test_tensor_parallelism_and_a_guider() -> None:
    for error, effect in processes.run(2, weight_cases.tensor_guider, "flux"):
        assert error < 1e-5 < 1e-2 < effect


@pytest.mark.parametrize(
    "name", ["StableDiffusionPAGPipeline", "PixArtSigmaPAGPipeline", "FluxPipeline"]
)
def test_fsdp(name: str) -> None:
    """Sharded at the root, by blocks, and inside of blocks: shared, skipped, shuffled as ever."""
    for found in processes.run(2, weight_cases.fsdp, name):
        assert len(found) == 9
        assert max(error for error, _, _ in found.values()) < 1e-5, found
        assert min(effect for _, effect, _ in found.values()) > 1e-2
        assert all(steps == {"shared": 2} for _, _, steps in found.values()), found
