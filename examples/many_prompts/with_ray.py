"""Prompts as a Ray dataset: actors that hold a patched pipeline draw them.

    pip install "ray[data]"
    python examples/many_prompts/with_ray.py OUT --actors 2 [--gpus 1]

The pipeline is patched once and travels to the actors, where it arrives patched. The model is the
one that ships with pag_fast, or ``--pipeline FOLDER_OR_HUB_ID``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

import pag_fast
from pag_fast.tools.load import emoji

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

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        call = json.loads(row["call"])
        generator = torch.Generator().manual_seed(row["seed"])
        picture = self.pipe(**call, num_inference_steps=self.steps, generator=generator).images[0]
        place = self.out / f"{row['name']}.png"
        picture.save(place)
        return {"name": row["name"], "steps": dict(pag_fast.explain(self.pipe).steps)}


def rows(path: Path) -> list[dict[str, Any]]:
    """Of a file of prompts: what a picture is called, its seed, and its call as JSON.

    A column of a dataset has one type, and keys differ from row to row.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        call = json.loads(line)
        name, seed = call.pop("id", f"{number:06}"), call.pop("seed", number)
        found.append({"name": name, "seed": seed, "call": json.dumps(call)})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pipeline", help="folder or name of a pipeline")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    args = parser.parse_args(argv)

    if args.pipeline is None:
        pipe = emoji()
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16)
    pag_fast.patch(pipe)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = ray.data.from_items(rows(args.prompts)).map(
        Draw,
        fn_constructor_args=(pipe, str(args.out.resolve()), args.steps),
        concurrency=args.actors,
        num_gpus=args.gpus,
    )
    for row in drawn.take_all():
        print(f"{row['name']}.png, steps: {row['steps']}")


if __name__ == "__main__":
    main()
