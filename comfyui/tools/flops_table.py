"""Prints the README's table of FLOPs, counted on the real engine with random models.

In the environment of ``make test-comfy``: ``python comfyui/tools/flops_table.py [--write]``.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent.parent
README = PACK / "README.md"
sys.path[:0] = [str(PACK / "tests"), str(PACK.parent)]

import patched  # noqa: E402
import tiny  # noqa: E402

STEPS = 2  # every step costs the same


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: a model, what the node is given, and the most that tests allow."""

    title: str
    model: str
    bound: float
    widgets: dict[str, Any] = dataclasses.field(default_factory=dict)
    cfg: float = 6.0
    controls: int = 0
    shape: tuple[int, ...] | None = None  # of the latent, unless it is the tiny model's

    def counted(self) -> tuple[float, float]:
        """FLOPs of a sampling with a whole perturbed pass and with a resumed one, × no PAG."""
        model = tiny.build(self.model)
        options: dict[str, Any] = {"steps": STEPS, "cfg": self.cfg, "shape": self.shape}
        if self.controls:
            made = [tiny.controlnet(model, seed) for seed in range(self.controls)]
            options["positive"], options["negative"] = tiny.controlled(model, *made)
        node = patched.pag if self.model in tiny.UNETS else patched.dit
        return patched.compare(model, functools.partial(node, **self.widgets), **options).ratios

    def line(self) -> str:
        """The line of the table."""
        whole, shared = self.counted()
        return f"| {self.title} | {whole:.2f} | **{shared:.2f}** | {self.bound:.2f} |"


ROWS = (
    Row("SDXL, middle block", "sdxl", 1.34),
    Row("the same at CFG 1", "sdxl", 1.67, cfg=1.0),
    Row("SDXL, output block 4", "sdxl", 1.07, {"unet_block": "output", "unet_block_id": 4}),
    Row("SDXL with a ControlNet, middle block", "sdxl", 1.20, controls=1),
    Row("the same at CFG 1", "sdxl", 1.34, cfg=1.0, controls=1),
    Row("SDXL with two ControlNets, middle block", "sdxl", 1.16, controls=2),
    Row("SD 1.5, middle block", "sd15", 1.34, shape=(1, 4, 32, 32)),
    Row("Flux, single block 0", "flux", 1.33, {"single_blocks": "0"}),
    Row("Chroma, single block 0", "chroma", 1.33, {"single_blocks": "0"}),
    Row("SD3, block 13 of 24", "sd3", 1.25),
    Row("Wan, block in the middle", "wan", 1.23, {"double_blocks": "4"}, shape=(1, 16, 2, 32, 32)),
    Row("Qwen-Image, block 40 of 60", "qwen_image", 1.17, shape=(1, 16, 1, 48, 48)),
)


def main() -> None:
    """Print the lines; with ``--write`` put them into the README."""
    lines = []
    for row in ROWS:
        lines.append(row.line())
        print(lines[-1], flush=True)
    if "--write" in sys.argv:
        text = README.read_text(encoding="utf-8").splitlines()
        start = next(n for n, line in enumerate(text) if line.startswith("|---|---|---|---|")) + 1
        end = next(n for n in range(start, len(text)) if not text[n])
        text[start:end] = lines
        README.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
