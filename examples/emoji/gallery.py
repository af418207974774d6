"""Every perturbation at three scales on the model that ships: ``python -m examples.emoji.gallery``.

Writes ``docs/gallery.png`` and the table in ``docs/gallery.md``: the pictures, and how often the
nearest training picture is the one that was asked for. Without CFG and with faint prompts (see
``pag_fast.tools.metrics.generate``), because that is where this model leaves guidance something to
do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import pag_fast
from pag_fast.perturbations import (
    BlurredMap,
    BlurredQueries,
    Identity,
    NoisyScores,
    Perturbation,
    ShuffledTokens,
    SkippedBlock,
    SoftIdentity,
)
from pag_fast.tools import load as models
from pag_fast.tools.metrics import Accuracy, NearestPicture, generate, prompt_accuracy

DOCS = Path(__file__).parents[2] / "docs"
SCALES = (0.75, 1.5, 3.0)
PERTURBATIONS: dict[str, Perturbation] = {
    "Identity()": Identity(),
    "SoftIdentity(0.5)": SoftIdentity(0.5),
    "BlurredQueries()": BlurredQueries(),
    "BlurredQueries(sigma=1)": BlurredQueries(1.0),
    "BlurredMap(sigma=1)": BlurredMap(1.0),
    "NoisyScores(sigma=1)": NoisyScores(1.0),
    "ShuffledTokens()": ShuffledTokens(),
    "SkippedBlock()": SkippedBlock(),
}
SHOWN = ("red apple", "snail", "guitar")
CALL: dict[str, Any] = {
    "prompt_weight": 0.45,
    "guidance_scale": 1.0,
    "num_inference_steps": 6,
}


def spread(captions: Sequence[str], count: int) -> list[str]:
    """``count`` captions, evenly spaced."""
    return [captions[i * len(captions) // count] for i in range(count)]


def sheet(
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]], columns: Sequence[str]
) -> Image.Image:
    """Rows of groups of pictures (n, 3, H, W) in [0, 1], with names."""
    size, gap, left, top = rows[0][1][0].shape[-1], 10, 170, 24
    wide = rows[0][1][0].shape[0] * size
    canvas = Image.new(
        "RGB", (left + len(columns) * (wide + gap), top + len(rows) * (size + 4)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * (wide + gap) + 4, 6), name, fill="black")
    for row, (name, groups) in enumerate(rows):
        y = top + row * (size + 4)
        draw.text((6, y + size // 2 - 6), name, fill="black")
        for column, images in enumerate(groups):
            pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            for index, picture in enumerate(pixels):
                at = (left + column * (wide + gap) + index * size, y)
                canvas.paste(Image.fromarray(picture), at)
    return canvas


def replace_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put a generated table between its two marks in a page."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    body = begin + "\n".join(lines) + "\n" + end
    new, found = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: body, text, flags=re.S
    )
    if found != 1:
        raise ValueError(f"{page.name} has no place for {name}: {begin.strip()} … {end}.")
    page.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="for the accuracy of each cell")
    arguments = parser.parse_args()
    pictures = models.emoji_pictures()
    known = NearestPicture(pictures.captions, pictures.images)
    captions = spread(pictures.captions, arguments.prompts)
    shown = [
        (next(c for c in pictures.captions if word in c), 7 + i) for i, word in enumerate(SHOWN)
    ]
    pipe = models.emoji()
    pipe.set_progress_bar_config(disable=True)

    def cell(scale: float) -> tuple[torch.Tensor, Accuracy]:
        call = {**CALL, "pag_scale": scale}
        return generate(pipe, shown, **call), prompt_accuracy(
            pipe, known, captions, seeds=(0,), **call
        )

    plain, accuracy = cell(0.0)
    lines = [
        "| perturbation | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
        "|---|" + "--:|" * len(SCALES),
        f"| none | {100 * accuracy.top1:.0f} % | | |",
    ]
    rows: list[tuple[str, list[torch.Tensor]]] = [("no perturbed branch", [plain])]
    for name, perturbation in tqdm(PERTURBATIONS.items(), unit="perturbation"):
        with pag_fast.patched(pipe, perturbation=perturbation):
            cells = [cell(scale) for scale in SCALES]
        rows.append((name, [images for images, _ in cells]))
        lines.append(
            f"| `{name}` | " + " | ".join(f"{100 * a.top1:.0f} %" for _, a in cells) + " |"
        )
    picture = sheet(rows, [f"scale {scale:g}" for scale in SCALES])
    picture.save(DOCS / "gallery.png", optimize=True)
    replace_table(DOCS / "gallery.md", "accuracy", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
