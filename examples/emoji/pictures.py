"""Write what a trained model is judged by: the training pictures and their captions."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from .data import SIZE, Emoji

COLUMNS = 20


def save_pictures(emoji: Emoji, folder: Path) -> None:
    """``pictures.png``, tiles in rows of 20, and ``captions.json``, in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(emoji.captions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE), "white")
    for index, image in enumerate(emoji.images):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        at = (index % COLUMNS * SIZE, index // COLUMNS * SIZE)
        sheet.paste(Image.fromarray(pixels), at)
    sheet.save(folder / "pictures.png", optimize=True)
    lines = json.dumps(emoji.captions, indent=0)
    (folder / "captions.json").write_text(lines + "\n", encoding="utf-8")
