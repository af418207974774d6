"""Writes ``assets/emoji`` of the pack from the diffusers pipeline that ships with ``pag_fast``.

In the environment of ``make test-comfy``: ``python comfyui/tools/convert_emoji.py``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
SOURCE = PACK.parent / "pag_fast" / "assets" / "emoji"
TARGET = PACK / "assets" / "emoji"
COPIED = (
    "LICENSE",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
)
sys.path[:0] = [str(PACK / "tests"), str(PACK.parent)]

import loaded  # noqa: E402, F401  (the engine)
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import comfy.utils  # noqa: E402  # isort: skip
from comfyui import emoji  # noqa: E402


def _unet() -> dict[str, torch.Tensor]:
    weights = load_file(SOURCE / "unet" / "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(emoji.UNET)
    return {f"model.diffusion_model.{names[k]}": v for k, v in weights.items()}


def _text_encoder() -> dict[str, torch.Tensor]:
    weights = load_file(SOURCE / "text_encoder" / "model.safetensors")
    return {f"cond_stage_model.transformer.{k}": v for k, v in weights.items()}


def _autoencoder() -> dict[str, torch.Tensor]:
    weights = load_file(SOURCE / "vae" / "diffusion_pytorch_model.safetensors")
    return {f"first_stage_model.{k.replace('.layers.', '.')}": v for k, v in weights.items()}


def converted() -> dict[str, torch.Tensor]:
    """All weights under the names that a checkpoint for ComfyUI has, in fp16."""
    weights = _unet() | _text_encoder() | _autoencoder()
    return {name: tensor.contiguous() for name, tensor in sorted(weights.items())}


def main() -> None:
    """Write weights and tokenizer."""
    TARGET.mkdir(parents=True, exist_ok=True)
    save_file(converted(), emoji.WEIGHTS, metadata={"format": "pt"})
    emoji.WEIGHTS.chmod(0o644)
    for name in COPIED:
        shutil.copyfile(SOURCE / name, TARGET / Path(name).name)


if __name__ == "__main__":
    main()
