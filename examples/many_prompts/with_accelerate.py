"""Prompts shared out by accelerate: a patched pipeline in every process.

    accelerate launch --num_processes 2 examples/many_prompts/with_accelerate.py OUT

Processes have a GPU each where there are GPUs, else they share the CPU (``--cpu``). The model is
the one that ships with pag_fast, or ``--pipeline FOLDER_OR_HUB_ID``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

import pag_fast
from pag_fast.tools.load import emoji

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw this process's share of the prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pipeline", help="folder or name of a pipeline")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)

    state = PartialState()
    if args.pipeline is None:
        pipe = emoji()
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16)
    pag_fast.patch(pipe.to(state.device))
    pipe.set_progress_bar_config(disable=not state.is_main_process)

    rows = [json.loads(line) for line in args.prompts.read_text("utf-8").splitlines() if line]
    args.out.mkdir(parents=True, exist_ok=True)
    with state.split_between_processes(list(enumerate(rows))) as mine:
        for number, row in mine:
            # a generator for each picture: it does not depend on who draws it
            generator = torch.Generator().manual_seed(row.pop("seed", number))
            name = row.pop("id", f"{number:06}")
            call = pipe(**row, num_inference_steps=args.steps, generator=generator)
            call.images[0].save(args.out / f"{name}.png")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
