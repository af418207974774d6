"""The training data: colour emoji rendered on white, captioned with their Unicode names.

The pictures come from Noto Color Emoji (Debian package ``fonts-noto-color-emoji``, SIL Open Font
License 1.1). Nothing is downloaded.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the font is a set of bitmaps of this one size
SIZE = 64  # pixels

# things one can name and draw, by Unicode block; signs, letters, clocks, flags, buildings, office
# supplies and people are left out
RANGES = [
    (0x1F330, 0x1F335),  # plants
    (0x1F337, 0x1F37F),  # flowers, fruit, vegetables, dishes, drinks
    (0x1F380, 0x1F384),  # celebration
    (0x1F3A0, 0x1F3AF),  # entertainment
    (0x1F3B7, 0x1F3BB),  # instruments
    (0x1F3C0, 0x1F3C0),  # sport
    (0x1F400, 0x1F43F),  # animals
    (0x1F451, 0x1F462),  # clothing
    (0x1F525, 0x1F52E),  # tools
    (0x1F600, 0x1F640),  # faces
    (0x1F680, 0x1F6A4),  # vehicles
    (0x1F950, 0x1F970),  # food, faces
    (0x1F980, 0x1F9AE),  # animals
    (0x1F9C0, 0x1F9CB),  # food
    (0x1FAD0, 0x1FADB),  # food
]


@dataclass
class Emoji:
    """``images``: (n, 3, size, size) in [-1, 1], fp32; ``captions``: lower-case names."""

    codes: list[int]
    captions: list[str]
    images: torch.Tensor


def render(code: int, size: int = SIZE, font: Path = FONT) -> torch.Tensor | None:
    """One emoji on white, (3, size, size) in [-1, 1]; None where the font has no picture."""
    face = ImageFont.truetype(str(font), STRIKE)
    glyph = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((12, 12), chr(code), font=face, embedded_color=True)
    box = glyph.getbbox()
    if box is None:
        return None
    glyph = glyph.crop(box)
    side = round(max(glyph.size) * 1.06)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    at = (side - glyph.width) // 2, (side - glyph.height) // 2
    canvas.alpha_composite(glyph, at)
    image = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def load(size: int = SIZE, least: float = 0.38) -> Emoji:
    """Every emoji of ``RANGES`` whose picture is at least ``least`` (RMS) from all earlier ones.

    Raises:
        ValueError: the font is not installed.
    """
    if not FONT.exists():
        raise ValueError(
            f"{FONT} is missing: install Noto Color Emoji (Debian: fonts-noto-color-emoji)."
        )
    codes, captions, images = [], [], []
    for first, last in RANGES:
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), "")
            image = render(code, size) if name else None
            if image is None:
                continue
            if images and min(_rms(image, torch.stack(images))) < least:
                continue
            codes.append(code)
            captions.append(name.lower().replace("-", " "))
            images.append(image)
    return Emoji(codes, captions, torch.stack(images))


def _rms(image: torch.Tensor, others: torch.Tensor) -> list[float]:
    return (others - image).square().mean(dim=(1, 2, 3)).sqrt().tolist()
