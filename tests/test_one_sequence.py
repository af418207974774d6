"""Blocks that get text and image as one sequence, and blocks that adjoin: shuffled and skipped."""

from __future__ import annotations

import pytest
import torch
from built_hosts import built_host
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast.models.registry import DESCRIPTIONS
from pag_fast.perturbations import ShuffledTokens
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sharing.layout import TEXT

HIDREAM = "HiDreamImagePipeline"
# a pipeline of each, one of its blocks, and whether the model's code has the image in front
KINDS = {
    "ChromaSingleTransformerBlock": ("ChromaPipeline", "single_transformer_blocks.1", False),
    "Flux2SingleTransformerBlock": ("Flux2Pipeline", "single_transformer_blocks.1", False),
    "HiDreamImageSingleTransformerBlock": (HIDREAM, "single_stream_blocks.1.block", True),
    "Krea2TransformerBlock": ("Krea2Pipeline", "transformer_blocks.1", False),
    "Lumina2TransformerBlock": ("Lumina2Pipeline", "layers.1", False),
    "ZImageTransformerBlock": ("ZImagePipeline", "layers.1", True),
}
TOKENS = 16  # of the pictures of all these


def test_every_kind_is_here():
    found = {
        kind
        for description in DESCRIPTIONS
        for kind, streams in description.blocks.items()
        if len(streams) == 1 and TEXT in streams[0].tokens
    }
    assert found == KINDS.keys()


@pytest.mark.parametrize("kind", [k for k, (name, *_) in KINDS.items() if name in HOSTS])
def test_tokens_of_the_image_are_shuffled_and_no_others(kind):
    name, named, image_first = KINDS[kind]
    pipe, seen = build(name), []
    block = pipe.transformer.get_submodule(named)
    assert type(block).__name__ == kind
    own = block.forward

    @row_wise
    def forward(*args, **kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())
        return own(*args, **kwargs)

    block.forward = forward
    layer = "^" + named.removesuffix(".block").replace(".", r"\.") + r"\."
    with pag_fast.patched(pipe, [layer], perturbation=ShuffledTokens(1)):
        latents(pipe, call_kwargs(name, pipe, steps=1))
    cond, perturbed = seen[0][-2:]
    moved = [i for i, x in enumerate(perturbed) if not torch.equal(x, cond[i])]
    first = 0 if image_first else len(cond) - TOKENS
    assert len(cond) > TOKENS and len(moved) > TOKENS // 2
    assert set(moved) <= set(range(first, first + TOKENS))
    image = slice(first, first + TOKENS)
    assert torch.equal(perturbed[image].sort(0)[0], cond[image].sort(0)[0])


ADJOINING = [
    (HIDREAM, ["double_stream_blocks.0", "double_stream_blocks.1"], "double_stream_blocks.1.block"),
    (HIDREAM, ["double_stream_blocks.2", "single_stream_blocks.0"], "single_stream_blocks.0.block"),
    (HIDREAM, ["double_stream_blocks.0", "single_stream_blocks.1"], "double_stream_blocks.0.block"),
    ("FluxPipeline", [r"^transformer_blocks.0", "^transformer_blocks.1"], "transformer_blocks.1"),
    ("FluxPipeline", [r"^transformer_blocks.2", "single.*s.0"], "single_transformer_blocks.0"),
    ("FluxPipeline", [r"^transformer_blocks.1", "single.*s.0"], "transformer_blocks.1"),
]


@pytest.mark.parametrize(("name", "layers", "end"), ADJOINING)
def test_blocks_that_adjoin_are_skipped(name, layers, end):
    """Also the last of one list and the first of the next."""
    pipe, made = built_host(name), []
    plain = latents(pipe, call_kwargs(name, pipe))
    for share in (True, False):
        with pag_fast.patched(pipe, layers, perturbation="skip", share_branches=share):
            made.append(latents(pipe, call_kwargs(name, pipe)))
            if share:
                assert f"the end of {end}" in pag_fast.explain(pipe, flops=False).tree[0]
    assert relative(made[0], made[1]) < 1e-5 and relative(made[0], plain) > 1e-3
