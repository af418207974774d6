"""The plots of the documentation, with the numbers that they are drawn from: ``make plots``.

A picture has its numbers as text inside, so that a test sees when they are no longer those of the
code, whatever a machine's fonts make of the pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

import pag_fast
from benchmarks import roofline, roofline_plot
from pag_fast.tools import plots
from pag_fast.tools.load import emoji

DOCS = Path(__file__).parent.parent / "docs"
KEY = "numbers"


def layers() -> tuple[Any, Any]:
    """What PAG costs on each layer of Stable Diffusion 3, as a figure and as numbers."""
    costs = pag_fast.layer_costs("StableDiffusion3PAGPipeline")
    return plots.layers_figure(costs), [[x.name, round(x.over_cfg, 3)] for x in costs.layers]


def explain() -> tuple[Any, Any]:
    """The branches of the model in the box, as a figure and as numbers."""
    explanation = pag_fast.explain(pag_fast.patch(emoji()))
    flops = [[p.cfg, p.stock, p.patched, p.bound] for p in explanation.flops]
    return plots.explanation_figure(explanation), [list(explanation.tree), flops]


def roofs() -> tuple[Any, Any]:
    """Predicted steps below the roofs of each chip, as a figure and as the tables of the page."""
    page = roofline.PAGE.read_text(encoding="utf-8")
    tables = [part.partition("<!-- end -->")[0] for part in page.split("<!-- roofline: ")[1:]]
    return roofline_plot.figure(page), tables


PLOTS = {"layers.png": layers, "explain.png": explain, "roofline.png": roofs}


def stored(name: str) -> Any:
    """The numbers that a picture was drawn from."""
    with Image.open(DOCS / name) as image:
        return json.loads(image.info[KEY])


def main() -> None:
    for name, draw in PLOTS.items():
        figure, numbers = draw()
        plots.save(figure, DOCS / name)
        text = PngImagePlugin.PngInfo()
        text.add_itxt(KEY, json.dumps(numbers))
        with Image.open(DOCS / name) as image:
            image.load()
            # text and lines of few colours: a palette is a third of the size
            image.convert("P", palette=Image.Palette.ADAPTIVE).save(
                DOCS / name, pnginfo=text, optimize=True
            )


if __name__ == "__main__":
    main()
