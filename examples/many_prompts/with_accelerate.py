"""Prompts shared out by accelerate: a patched pipeline in every process.

    accelerate launch --num_processes 2 examples/many_prompts/with_accelerate.py OUT

Processes have a GPU each where there are GPUs, else they share the CPU (``--cpu``). The model is
the one that ships with pag_fast, or ``--pipeline FOLDER_OR_HUB_ID``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

import pag_fast
from pag_fast.tools.generate.rows import read_rows
from pag_fast.tools.load import load

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw this process's share of the prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pipeline", default="emoji", help="folder or name of a pipeline")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)

    state = PartialState()
    dtype = None if args.pipeline == "emoji" else torch.bfloat16
    pipe = load(args.pipeline, dtype, str(state.device), as_saved=True)
    pag_fast.patch(pipe)
    pipe.set_progress_bar_config(disable=not state.is_main_process)

    args.out.mkdir(parents=True, exist_ok=True)
    with state.split_between_processes(read_rows(args.prompts, seed=0)) as mine:
        for row in mine:
            call = {**row.call, "negative_prompt": row.negative_prompt}
            # a generator for each picture: it does not depend on who draws it
            call["generator"] = torch.Generator().manual_seed(row.seed)
            picture = pipe(row.prompt, num_inference_steps=args.steps, **call).images[0]
            picture.save(args.out / f"{row.name}.png")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
