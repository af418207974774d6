"""Prompt accuracy by guidance scale, PAG scale and layers: ``python -m examples.emoji.evaluate``.

Every cell generates ``--prompts`` captions with ``--seeds`` seeds and asks which training picture
is nearest: once with the captions as they are, and once asked for faintly, because the model leaves
guidance little to improve where the caption is plain. The pipeline is patched with pag_fast;
``tests/test_emoji.py`` shows that this changes no picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

import pag_fast
from pag_fast.tools import load as models
from pag_fast.tools.metrics import NearestPicture, prompt_accuracy

GUIDANCE = (1.0, 2.0, 4.0, 7.0)
PAG = (0.0, 1.5, 3.0, 5.0)
LAYERS = (("mid",), ("up_blocks.1",))
WEIGHTS = (1.0, 0.45)  # of the prompt, see pag_fast.tools.metrics.generate
RESULT = Path(__file__).parent / "accuracy.json"


@dataclass(frozen=True)
class Setting:
    """``layers`` is empty where the PAG scale is 0."""

    prompt_weight: float
    guidance_scale: float
    pag_scale: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One cell of the table, and how many pictures go into it."""

    setting: Setting
    prompts: int
    seeds: int
    steps: int


def settings() -> Iterator[Setting]:
    """Every cell of both tables: those with PAG scale 0 once for all layers."""
    for weight, guidance in itertools.product(WEIGHTS, GUIDANCE):
        yield Setting(weight, guidance, 0.0, ())
        for layers in LAYERS:
            for pag in PAG[1:]:
                yield Setting(weight, guidance, pag, layers)


def run(job: Job) -> dict[str, object]:
    """One cell: its setting and its accuracy."""
    torch.set_num_threads(1)
    pictures = models.emoji_pictures()
    known = NearestPicture(pictures.captions, pictures.images)
    count = len(pictures.captions)
    captions = [pictures.captions[i * count // job.prompts] for i in range(job.prompts)]
    pipe = models.emoji()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    setting = job.setting
    with pag_fast.patched(pipe, list(setting.layers) or None):
        accuracy = prompt_accuracy(
            pipe,
            known,
            captions,
            seeds=range(job.seeds),
            prompt_weight=setting.prompt_weight,
            num_inference_steps=job.steps,
            guidance_scale=setting.guidance_scale,
            pag_scale=setting.pag_scale,
        )
    return {**asdict(setting), **asdict(accuracy)}


def markdown(cells: Sequence[dict], weight: float) -> str:
    """The table of one prompt weight: top-1 / top-5 in %, by guidance and layers, and PAG scale."""
    by_setting = {
        (c["guidance_scale"], c["pag_scale"], tuple(c["layers"])): c
        for c in cells
        if c["prompt_weight"] == weight
    }
    lines = ["| CFG | PAG layers | " + " | ".join(f"PAG {pag:g}" for pag in PAG) + " |"]
    lines.append("|---|---|" + "--:|" * len(PAG))
    for guidance in GUIDANCE:
        for layers in LAYERS:
            row = [by_setting.get((guidance, pag, layers if pag else ())) for pag in PAG]
            texts = [
                "" if c is None else f"{100 * c['top1']:.1f} / {100 * c['top5']:.1f}" for c in row
            ]
            names = ", ".join(f"`{layer}`" for layer in layers)
            scale = "off" if guidance == 1.0 else f"{guidance:g}"
            lines.append(f"| {scale} | {names} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="evenly spaced over the captions")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    todo = [Job(s, arguments.prompts, arguments.seeds, arguments.steps) for s in settings()]
    cells: list[dict] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for cell in tqdm(pool.map(run, todo), total=len(todo), unit="cell"):
            cells.append(cell)
            # after every cell: a long run that is cut short leaves what it has
            report = {"steps": arguments.steps, "cells": cells}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for weight in WEIGHTS:
        print(f"\nprompt weight {weight:g}\n\n{markdown(cells, weight)}")


if __name__ == "__main__":
    main()
