"""The options of ``pag-fast generate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .settings.checks import number, whole_number


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
    command.add_argument("--prompts", type=Path, required=True, help="a file of JSON lines")
    command.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    command.add_argument(
        "--pipeline",
        default="emoji",
        metavar="PATH_OR_HUB_ID",
        help="a pipeline of your own; omitted, the small one that ships with pag_fast",
    )
    command.add_argument("--layers", nargs="+", help="omitted, the pipeline's own")
    command.add_argument("--batch", type=int, default=4, help="prompts in one call")
    command.add_argument("--steps", type=int, help="of each call; omitted, the pipeline's own")
    command.add_argument("--guidance-scale", type=float, help="omitted, the pipeline's own")
    command.add_argument("--pag-scale", type=float, default=3.0)
    command.add_argument("--height", type=int, help="pixels; omitted, the pipeline's own")
    command.add_argument("--width", type=int)
    command.add_argument("--seed", type=int, default=0, help="of the first row; rows count on")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    command.add_argument("--shard", metavar="I/N", help="omitted, as the launcher says")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw what the options say; 1 if rows failed."""
    from .tools import load as models
    from .tools.generate.run import Job, generate
    from .tools.generate.shards import local_index, shard_of

    call: dict[str, Any] = {
        "pag_scale": number("--pag-scale", arguments.pag_scale, least=0.0),
    }
    if arguments.guidance_scale is not None:
        scale = number("--guidance-scale", arguments.guidance_scale, least=0.0)
        call["guidance_scale"] = scale
    for option, name in (
        ("steps", "num_inference_steps"),
        ("height", "height"),
        ("width", "width"),
    ):
        if (value := getattr(arguments, option)) is not None:
            call[name] = whole_number(f"--{option}", value, least=1)
    job = Job(
        prompts=arguments.prompts,
        out=arguments.out,
        pipeline=arguments.pipeline,
        layers=None if arguments.layers is None else tuple(arguments.layers),
        call=call,
        seed=whole_number("--seed", arguments.seed, least=0, most=2**63 - 1),
        batch=whole_number("--batch", arguments.batch, least=1),
        dtype=arguments.dtype,
    )
    failed = generate(job, shard_of(arguments.shard), models.numbered_device(local_index()))
    return 1 if failed else 0
