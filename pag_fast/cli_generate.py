"""The options of ``pag-fast generate``."""

from __future__ import annotations

import argparse
from typing import Any

from .cli_options import (
    SEEDS,
    add_dtype,
    add_pipeline,
    add_scales,
    add_size,
    existing_file,
    given,
    out_folder,
    whole,
)


def add_command(commands: Any) -> None:
    """Add the subcommand to those of ``pag-fast``."""
    command = commands.add_parser(
        "generate",
        help="pictures of a file of prompts, in as many processes as there are devices",
        description="Draws one picture for each line of a file of JSON objects with a prompt, and "
        "perhaps id, seed, negative_prompt and arguments of the pipeline's call. Pictures that are "
        "there are not drawn again. Under torchrun, accelerate and SLURM each process takes its "
        "share.",
    )
    command.add_argument(
        "--prompts", type=existing_file("--prompts"), required=True, help="a file of JSON lines"
    )
    command.add_argument(
        "--out", type=out_folder("--out"), required=True, help="folder of the pictures"
    )
    add_pipeline(command)
    command.add_argument("--batch", type=whole("--batch", 1), default=4, help="prompts in one call")
    command.add_argument(
        "--steps", type=whole("--steps", 1), help="of each call; omitted, the pipeline's own"
    )
    add_scales(command, "omitted, the pipeline's own")
    add_size(command)
    command.add_argument(
        "--seed", type=whole("--seed", 0, SEEDS), default=0, help="of the first row; rows count on"
    )
    add_dtype(command)
    command.add_argument("--shard", metavar="I/N", help="omitted, as the launcher says")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw what the options say; 1 if rows failed."""
    from .tools import load as models
    from .tools.generate.run import Job, generate
    from .tools.generate.shards import local_index, shard_of

    call = given(
        arguments,
        pag_scale="pag_scale",
        guidance_scale="guidance_scale",
        steps="num_inference_steps",
        height="height",
        width="width",
    )
    job = Job(
        prompts=arguments.prompts,
        out=arguments.out,
        pipeline=arguments.pipeline,
        layers=None if arguments.layers is None else tuple(arguments.layers),
        call=call,
        seed=arguments.seed,
        batch=arguments.batch,
        dtype=arguments.dtype,
    )
    failed = generate(job, shard_of(arguments.shard), models.numbered_device(local_index()))
    return 1 if failed else 0
