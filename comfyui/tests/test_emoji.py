"""The model in the box draws in ComfyUI what it draws in diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers_emoji as theirs
import loaded  # noqa: F401  (the engine)
import pytest
import torch
from safetensors.torch import load_file

# isort: split
import comfy.sample
import comfy.utils
import tiny

from comfyui import emoji
from comfyui.tools import convert_emoji


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    return emoji.PagFastEmoji.execute(batch_size=2).result


def _draw(parts: tuple[Any, ...], scale: float) -> torch.Tensor:
    from nodes import CLIPTextEncode, VAEDecode

    model, clip, vae, latent = parts
    encode = CLIPTextEncode().encode
    out = []
    for row, prompt in enumerate(theirs.PROMPTS):
        samples = comfy.sample.sample(
            model if not scale else tiny.stock(model, scale),
            theirs.noise()[row, None],
            *(theirs.STEPS, theirs.CFG, "euler", "simple"),
            *(encode(clip, prompt)[0], encode(clip, "")[0], latent["samples"][row, None]),
            disable_pbar=True,
        )
        (image,) = VAEDecode().decode(vae, {"samples": samples})
        out.append(image)
    return torch.cat(out)


def test_pictures_are_those_of_diffusers(parts: tuple[Any, ...], tmp_path: Path) -> None:
    file = tmp_path / "diffusers.safetensors"
    subprocess.run([sys.executable, theirs.__file__, str(file)], check=True)
    expected = load_file(file)
    images = {}
    for scale in theirs.SCALES:
        images[scale] = _draw(parts, scale)
        assert images[scale].shape == (2, 64, 64, 3)
        # measured: 3e-4, where every network is equal bit by bit; sigmas begin with 4518, not ∞
        assert (images[scale] - expected[str(scale)]).abs().max() < 1e-3
    assert (images[0.0] - images[3.0]).abs().max() > 0.03


def test_the_autoencoder_encodes_what_it_decodes(parts: tuple[Any, ...]) -> None:
    from nodes import VAEDecode, VAEEncode

    image = _draw(parts, 0.0)
    (latent,) = VAEEncode().encode(parts[2], image)
    assert latent["samples"].shape == (2, 4, 16, 16)
    (again,) = VAEDecode().decode(parts[2], latent)
    assert (again - image).abs().mean() < 0.02


def test_a_prompt_of_one_word_per_token_and_weights(parts: tuple[Any, ...]) -> None:
    clip = parts[1]
    (tokens,) = clip.tokenize("red apple")["l"]
    assert len(tokens) == emoji.TOKENS
    assert [token for token, _ in tokens[:4]] == [1538, 1097, 708, 1539]
    plain, weighted = (clip.encode_from_tokens(clip.tokenize(p)) for p in ("dog", "(dog:1.5)"))
    assert plain.shape == weighted.shape == (1, emoji.TOKENS, 128)
    assert not torch.equal(plain, weighted)


def test_shipped_weights_are_those_of_the_pipeline() -> None:
    shipped, expected = load_file(emoji.WEIGHTS), convert_emoji.converted()
    assert shipped.keys() == expected.keys()
    assert all(torch.equal(shipped[name], expected[name]) for name in expected)
    for name in convert_emoji.COPIED:
        source = convert_emoji.SOURCE / name
        assert (emoji.FOLDER / source.name).read_bytes() == source.read_bytes()
