"""Saving a pipeline so that old and new versions of diffusers and transformers load it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save(out: Path, vae: Any, tokenizer: Any, text_encoder: Any, unet: Any, scheduler: Any) -> None:
    """Write a ``StableDiffusionPAGPipeline`` in diffusers' format, weights in fp16."""
    from diffusers import StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    _widen_compatibility(out)


def _widen_compatibility(out: Path) -> None:
    # transformers 4 knows the text encoder's weights by the names that every hub model has
    weights = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in _load(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    # transformers loads in the dtype that was saved, diffusers in fp32: they must agree
    _edit(out / "text_encoder" / "config.json", {"dtype": "float32"}, drop=("torch_dtype",))
    # AutoencoderTiny derives block_out_channels, and warns when it finds it; nobody needs to know
    # where the training left its checkpoints
    _edit(out / "unet" / "config.json", {}, drop=("_name_or_path",))
    _edit(out / "vae" / "config.json", {}, drop=("_name_or_path", "block_out_channels"))
    # tokenizers 4 and 5 both read vocab.json and merges.txt
    (out / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    drop = ("backend", "is_local", "local_files_only")
    _edit(out / "tokenizer" / "tokenizer_config.json", {}, drop=drop)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def _load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in load_file(path).items()}


def _edit(path: Path, entries: dict[str, Any], *, drop: tuple[str, ...]) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    found = {name: value for name, value in found.items() if name not in drop} | entries
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
