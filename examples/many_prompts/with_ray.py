"""Prompts as a Ray dataset: actors that hold a patched pipeline draw them.

    pip install "ray[data]"
    python examples/many_prompts/with_ray.py OUT --actors 2 [--gpus 1]

The pipeline is patched once and travels to the actors, where it arrives patched. The model is the
one that ships with pag_fast, or ``--pipeline FOLDER_OR_HUB_ID``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

import pag_fast
from pag_fast.tools.generate.rows import Row, read_rows
from pag_fast.tools.load import load

PROMPTS = Path(__file__).parent / "prompts.jsonl"


class Draw:
    """An actor with a pipeline of its own.

    Args:
        pipe: patched or not; it arrives as it was sent.
        out: the folder that all actors write to.
    """

    def __init__(self, pipe: Any, out: str, steps: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe, self.out, self.steps = pipe.to(device), Path(out), steps
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, item: dict[str, Row]) -> dict[str, Any]:
        row = item["item"]
        call = {**row.call, "negative_prompt": row.negative_prompt}
        # a generator for each picture: it does not depend on who draws it
        call["generator"] = torch.Generator().manual_seed(row.seed)
        picture = self.pipe(row.prompt, num_inference_steps=self.steps, **call).images[0]
        picture.save(self.out / f"{row.name}.png")
        return {"name": row.name, "steps": dict(pag_fast.explain(self.pipe).steps)}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pipeline", default="emoji", help="folder or name of a pipeline")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    args = parser.parse_args(argv)

    dtype = None if args.pipeline == "emoji" else torch.bfloat16
    pipe = load(args.pipeline, dtype, "cpu", as_saved=True)
    pag_fast.patch(pipe)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = ray.data.from_items(read_rows(args.prompts, seed=0)).map(
        Draw,
        fn_constructor_args=(pipe, str(args.out.resolve()), args.steps),
        concurrency=args.actors,
        num_gpus=args.gpus,
    )
    for row in drawn.take_all():
        print(f"{row['name']}.png, steps: {row['steps']}")


if __name__ == "__main__":
    main()
