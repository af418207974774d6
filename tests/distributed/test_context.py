"""Context parallelism: two processes make the picture of one, or say why not."""

from __future__ import annotations

import context_cases
import diffusers
import guider_cases
import processes
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers is older"
)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
def test_two_processes_make_the_picture_of_one(name: str) -> None:
    """Every perturbation, Ulysses and ring, sequences of all lengths, with CFG and without."""
    for found in processes.run(2, context_cases.exact, name):
        assert len(found) == 8 + 7 * 3
        assert max(error for error, _ in found.values()) < 1e-5, found
        assert min(effect for _, effect in found.values()) > 1e-2


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
def test_branches_and_tokens_on_four_processes(name: str) -> None:
    """Rows of branches on two ranks, each of them two that share out its tokens."""
    shape = {"branch": 2, "ring": 1, "ulysses": 2}
    first, *others = processes.run(4, context_cases.on_branches, name, shape=shape)
    assert len(first) == 6
    for case, ((error, effect), out) in first.items():
        assert error < 1e-5 < 1e-2 < effect, case
        assert all(torch.equal(out, rank[case][1]) for rank in others), case


def test_what_is_not_exact_is_refused() -> None:
    """On every rank, and in a sentence: another model, uneven heads, masks in a ring, a plan."""
    for found in processes.run(2, context_cases.refused):
        said = {
            "model": "not known how to have all of it",
            "heads": "has 3 heads, which 2 ranks cannot share equally",
            "ring": "use ulysses_degree, or prompts without padding",
            "plan": "diffusers' own way to cut sequences, and no other cp_plan",
            "by hand": "on a model that was not told of it",
        }
        assert found.keys() == said.keys()
        assert all(words in found[case] for case, words in said.items()), found


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_guiders(name: str) -> None:
    """Perturbed attention and skipped layers, resumed as in one process."""
    for found in processes.run(2, guider_cases.exact, name):
        assert len(found) == (12 if name == "qwen" else 14)
        assert max(error for error, _, _ in found.values()) < 1e-5, found
        assert min(effect for _, effect, _ in found.values()) > 1e-2
        assert not any(warnings for _, _, warnings in found.values()), "not resumed"
