"""One picture on two or three processes, each with some of its branches.

    torchrun --nproc-per-node 2 examples/ranks/draw.py "red apple" --out apple.png

Processes have a GPU each where there are GPUs, else they share the CPU. The model is the one that
ships with pag_fast, or ``--pipeline FOLDER_OR_HUB_ID``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pag_fast
from pag_fast.tools.load import load


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and let the first rank save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", default="emoji", help="folder or name of a pipeline")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="picture.png")
    args = parser.parse_args(argv)

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("branch",))

    dtype = None if args.pipeline == "emoji" else torch.bfloat16
    pipe = load(args.pipeline, dtype, kind, as_saved=True)
    pag_fast.patch(pipe, mesh=mesh["branch"])
    first = mesh.get_rank() == 0
    pipe.set_progress_bar_config(disable=not first)

    # every rank makes the same call; a generator with the same seed each
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    picture = pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0]
    if first:
        picture.save(args.out)
        print(f"{args.out}, {time.perf_counter() - start:.1f} s on {mesh.size()} {kind} processes")
        print(pag_fast.explain(pipe))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
