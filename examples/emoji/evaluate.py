"""Prompt accuracy by guidance scale, PAG scale and layers: ``python -m examples.emoji.evaluate``.

Every cell generates ``--prompts`` captions with ``--seeds`` seeds and asks which training picture
is nearest. The pipeline is patched with pag_fast: :mod:`tests.test_emoji` shows that this changes
no picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import pag_fast
from pag_fast import models
from pag_fast.fidelity import NearestPicture, prompt_accuracy

GUIDANCE = (1.0, 2.0, 4.0, 7.0)
PAG = (0.0, 1.5, 3.0, 5.0)
LAYERS = (("mid",), ("mid", "up_blocks.0"))


@dataclass(frozen=True)
class Cell:
    """One setting and its accuracy; ``layers`` is empty where the PAG scale is 0."""

    guidance_scale: float
    pag_scale: float
    layers: tuple[str, ...]
    top1: float
    top5: float
    images: int


def cells() -> Iterator[tuple[float, float, tuple[str, ...]]]:
    """Guidance scale, PAG scale, layers: with PAG scale 0 once for all layers."""
    for guidance in GUIDANCE:
        yield guidance, 0.0, ()
        for layers in LAYERS:
            for pag in PAG[1:]:
                yield guidance, pag, layers


def evaluate(
    pipe: Any, captions: Sequence[str], known: NearestPicture, *, seeds: int, steps: int
) -> Iterator[Cell]:
    """Fill the table, cell by cell."""
    settings = list(cells())
    with tqdm(total=len(settings) * len(captions) * seeds, unit="image", mininterval=5) as bar:
        for guidance, pag, layers in settings:
            with pag_fast.patched(pipe, list(layers) or None):
                accuracy = prompt_accuracy(
                    pipe,
                    known,
                    captions,
                    seeds=range(seeds),
                    progress=bar.update,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    pag_scale=pag,
                )
            yield Cell(guidance, pag, layers, **asdict(accuracy))


def markdown(found: Sequence[Cell]) -> str:
    """The table: a row per guidance scale and layers, a column per PAG scale, top-1 / top-5."""
    by_setting = {(c.guidance_scale, c.pag_scale, c.layers): c for c in found}
    lines = ["| CFG | layers | " + " | ".join(f"PAG {pag:g}" for pag in PAG) + " |"]
    lines.append("|---|---|" + "--:|" * len(PAG))
    for guidance in GUIDANCE:
        for layers in LAYERS:
            row = [by_setting.get((guidance, pag, layers if pag else ())) for pag in PAG]
            texts = ["" if c is None else f"{c.top1:.1%} / {c.top5:.1%}" for c in row]
            names = ", ".join(f"`{layer}`" for layer in layers)
            scale = "off" if guidance == 1.0 else f"{guidance:g}"
            lines.append(f"| {scale} | {names} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help='a folder, or "emoji": the shipped one')
    parser.add_argument("--prompts", type=int, default=320, help="evenly spaced over the captions")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("accuracy"))
    arguments = parser.parse_args()
    pictures = models.emoji_pictures()
    known = NearestPicture(pictures.captions, pictures.images)
    count = len(pictures.captions)
    picked = [pictures.captions[i * count // arguments.prompts] for i in range(arguments.prompts)]
    pipe = models.load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    found: list[Cell] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for cell in evaluate(pipe, picked, known, seeds=arguments.seeds, steps=arguments.steps):
        found.append(cell)
        # after every cell: a long run that is cut short leaves what it has
        (arguments.out / "accuracy.md").write_text(markdown(found) + "\n", encoding="utf-8")
        report = {"steps": arguments.steps, "cells": [asdict(cell) for cell in found]}
        (arguments.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
