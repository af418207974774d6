"""Draws the nodes of a workflow as ComfyUI shows them, from its JSON alone.

In the environment of ``make test-comfy``, for all workflows of the pack:
``python comfyui/tools/render_workflow.py [OUTPUT]``. Nodes that save show what they have saved in
OUTPUT, ComfyUI's output folder.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

EXAMPLES = Path(__file__).resolve().parent.parent / "example_workflows"
TITLE, SLOT, WIDGET, MARGIN = 30, 20, 24, 30  # heights of a line, in the workflow's units
SCALE = 2  # drawn larger, then reduced: smooth lines
BACK, BODY, HEAD, FIELD = "#202020", "#353535", "#2a2a2a", "#1e1e1e"
TEXT, FAINT = "#dddddd", "#999999"
COLORS = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
}
Place = tuple[float, float]


def draw(workflow: dict[str, Any], output: Path | None = None) -> Image.Image:
    """A picture of all nodes, their values and links, and of what was saved in ``output``."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    left = min(node["pos"][0] for node in nodes.values()) - MARGIN
    top = min(node["pos"][1] for node in nodes.values()) - MARGIN - TITLE
    width = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + MARGIN - left
    height = max(node["pos"][1] + _height(node) for node in nodes.values()) + MARGIN - top
    image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), BACK)
    pen = _Pen(image, left, top)
    for _, origin, sent, target, slot, kind in workflow["links"]:
        pen.link(_output(nodes[origin], sent), _input(nodes[target], slot), kind)
    for node in nodes.values():
        _node(pen, node)
        if output and node["type"] == "SaveImage":
            saved = sorted(output.glob(f"{node['widgets_values'][0]}_*.png"))
            top = node["pos"][1] + SLOT + WIDGET + 12
            pen.pictures(saved, (node["pos"][0] + 8, top), node["size"][0] - 16)
    return image.resize((round(width), round(height)), Image.Resampling.LANCZOS)


def _slots(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [slot for slot in node["inputs"] if "widget" not in slot]


def _values(node: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of widgets; behind a seed follows what happens to it."""
    names = []
    for slot in node["inputs"]:
        if "widget" in slot:
            names.append(slot["name"])
            if slot["name"] == "seed":
                names.append("control after generate")
    return list(zip(names, node["widgets_values"], strict=False))


def _height(node: dict[str, Any]) -> float:
    lines = max(len(_slots(node)), len(node["outputs"]))
    return max(node["size"][1], lines * SLOT + len(_values(node)) * WIDGET + 10)


def _input(node: dict[str, Any], slot: int) -> Place:
    return node["pos"][0], node["pos"][1] + SLOT * (slot + 0.6)


def _output(node: dict[str, Any], slot: int) -> Place:
    return node["pos"][0] + node["size"][0], node["pos"][1] + SLOT * (slot + 0.6)


class _Pen:
    """Draws in the workflow's units."""

    def __init__(self, image: Image.Image, left: float, top: float) -> None:
        self.image, self.left, self.top = image, left, top
        self.draw = ImageDraw.Draw(image)
        self.font = ImageFont.load_default(12 * SCALE)

    def _at(self, place: Place) -> Place:
        return (place[0] - self.left) * SCALE, (place[1] - self.top) * SCALE

    def box(self, start: Place, end: Place, color: str, radius: float = 6) -> None:
        self.draw.rounded_rectangle((*self._at(start), *self._at(end)), radius * SCALE, color)

    def dot(self, place: Place, kind: str) -> None:
        x, y = self._at(place)
        radius = 4 * SCALE
        color = COLORS.get(kind, FAINT)
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)

    def text(self, place: Place, words: str, color: str = TEXT, anchor: str = "lm") -> None:
        self.draw.text(self._at(place), words, color, self.font, anchor)

    def fits(self, words: str, width: float) -> str:
        """As much of the words as is that wide."""
        while words and self.draw.textlength(words, self.font) > width * SCALE:
            words = words[:-2].rstrip("…") + "…" if len(words) > 2 else ""
        return words

    def lines(self, place: Place, words: str, width: float, height: float) -> None:
        """Words broken into lines."""
        x, y = place
        for paragraph in words.splitlines():
            line = ""
            for word in [*paragraph.split(), None]:
                longer = f"{line} {word}".strip()
                if word is None or self.draw.textlength(longer, self.font) > width * SCALE:
                    if y < place[1] + height:
                        self.text((x, y), line)
                    y, line = y + 16, word or ""
                else:
                    line = longer

    def pictures(self, paths: list[Path], place: Place, width: float) -> None:
        """Square pictures in as many rows as columns."""
        columns = math.ceil(len(paths) ** 0.5)
        for number, path in enumerate(paths):
            row, column = divmod(number, columns)
            side = round(width / columns * SCALE)
            x, y = self._at((place[0] + column * width / columns, place[1] + row * width / columns))
            with Image.open(path) as picture:
                large = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            self.image.paste(large, (round(x), round(y)))

    def link(self, start: Place, end: Place, kind: str) -> None:
        """A curve that leaves and arrives horizontally."""
        (x0, y0), (x3, y3) = start, end
        away = max(30.0, abs(x3 - x0) / 3)
        points = []
        for step in range(41):
            t = step / 40
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            x = a * x0 + b * (x0 + away) + c * (x3 - away) + d * x3
            points.append(self._at((x, (a + b) * y0 + (c + d) * y3)))
        self.draw.line(points, COLORS.get(kind, FAINT), 2 * SCALE, "curve")


def _node(pen: _Pen, node: dict[str, Any]) -> None:
    (x, y), width = node["pos"], node["size"][0]
    bottom = y + _height(node)
    pen.box((x, y - TITLE), (x + width, bottom), BODY)
    pen.box((x, y - TITLE), (x + width, y), HEAD)
    pen.text((x + 12, y - TITLE / 2), pen.fits(node.get("title", node["type"]), width - 24))
    for slot, one in enumerate(_slots(node)):
        place = _input(node, slot)
        pen.dot(place, one["type"])
        pen.text((place[0] + 12, place[1]), one["name"])
    for slot, one in enumerate(node["outputs"]):
        place = _output(node, slot)
        pen.dot(place, one["type"])
        pen.text((place[0] - 12, place[1]), one["name"], anchor="rm")
    line = y + 6 + SLOT * max(len(_slots(node)), len(node["outputs"]))
    if node["type"] in ("CLIPTextEncode", "MarkdownNote"):
        pen.box((x + 8, line), (x + width - 8, bottom - 8), FIELD)
        pen.lines((x + 16, line + 14), node["widgets_values"][0], width - 32, bottom - line - 20)
        return
    for name, value in _values(node):
        pen.box((x + 8, line), (x + width - 8, line + WIDGET - 4), FIELD, 9)
        middle = line + WIDGET / 2 - 2
        shown = pen.fits(str(value), width - 140)
        pen.text((x + 18, middle), name, FAINT)
        pen.text((x + width - 18, middle), shown, anchor="rm")
        line += WIDGET


def main() -> None:
    """Write ``NAME.jpg`` beside every ``NAME.json``."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for path in sorted(EXAMPLES.glob("*.json")):
        picture = draw(json.loads(path.read_text(encoding="utf-8")), output)
        picture.save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
