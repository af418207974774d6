"""The command line: ``pag-fast layers | ledger | demo | bench | generate | verify | ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import cli_counts, cli_generate
from .cli_options import (
    SEEDS,
    Parser,
    add_dtype,
    add_json,
    add_pipeline,
    add_scales,
    add_size,
    given,
    new_file,
    out_folder,
    whole,
)
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Bad input, and files that cannot be read or written, end with a sentence on standard error and
    status 2. A reader that has gone, as that of ``| head``, ends the command without one.
    """
    for stream in (sys.stdout, sys.stderr):
        # a report has characters that not every encoding has, and the work is done when it is shown
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # what is still buffered would be written, and fail again, when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"pag-fast: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"pag-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pag-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pag_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_counts.add_commands(commands)

    demo = commands.add_parser(
        "demo", help="without PAG, stock PAG and patched PAG: time and pictures, no download"
    )
    _pipeline_options(demo, "demo", steps=20, rounds=3)
    demo.add_argument("--seed", type=whole("--seed", 0, SEEDS), default=0)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", help="time a pipeline without PAG, with stock PAG and patched, in turns"
    )
    _pipeline_options(bench, "bench", steps=10, rounds=5)
    bench.add_argument("--compile", action="store_true", help="under torch.compile too")
    bench.set_defaults(run=_bench)

    cli_generate.add_command(commands)
    _verify_options(commands)
    _describe_options(commands)

    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.set_defaults(run=_env)
    return parser


def _verify_options(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="one call stock and one patched: do they differ? For a bug report"
    )
    add_pipeline(verify)
    verify.add_argument("--prompt", default="red apple")
    verify.add_argument("--steps", type=whole("--steps", 1), default=4, help="of either call")
    add_scales(verify, "omitted, the pipeline's own")
    add_dtype(verify, "omitted, fp16 on an accelerator; fp32 tells small faults from rounding")
    add_json(verify, "the result")
    verify.set_defaults(run=_verify)


def _describe_options(commands: Any) -> None:
    command = commands.add_parser(
        "describe",
        help="what is known of a pipeline and its denoiser; of unknown ones, what a call shows",
    )
    add_pipeline(command, "a pipeline of any class")
    command.add_argument("--prompt", default="red apple")
    command.add_argument("--steps", type=whole("--steps", 2), default=2, help="of the call")
    add_size(command)
    command.add_argument(
        "--write",
        type=new_file("--write"),
        metavar="FILE",
        help="a file for pag_fast/models that describes the denoiser, to contribute",
    )
    command.set_defaults(run=_describe)


def _pipeline_options(
    command: argparse.ArgumentParser, out: str, *, steps: int, rounds: int
) -> None:
    add_pipeline(command, "a text-to-image model of your own")
    command.add_argument("--prompt", action="append", help="may be given several times")
    command.add_argument("--steps", type=whole("--steps", 2), default=steps, help="of one call")
    command.add_argument(
        "--batch", type=whole("--batch", 1), help="prompts per call: 8, with your own model 1"
    )
    command.add_argument(
        "--rounds", type=whole("--rounds", 1), default=rounds, help="how often everything is timed"
    )
    add_scales(command, "1 is off; 2 if omitted, 5 with a model of your own")
    command.add_argument(
        "--out", type=out_folder("--out"), default=out, help="folder for picture and JSON"
    )


def _pipeline_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`_pipeline_options` say, for ``run_demo`` and ``bench_pipeline``."""
    from .config import PatchConfig
    from .tools.demo import PROMPTS

    shipped = arguments.pipeline == "emoji"
    scale, batch = arguments.guidance_scale, arguments.batch
    return {
        "prompts": arguments.prompt or PROMPTS,
        "steps": arguments.steps,
        "guidance_scale": (2.0 if shipped else 5.0) if scale is None else scale,
        "pag_scale": arguments.pag_scale,
        "batch": (8 if shipped else 1) if batch is None else batch,
        "rounds": arguments.rounds,
        "config": PatchConfig(layers=arguments.layers),
    }


def _demo(arguments: argparse.Namespace) -> None:
    from . import explain, patched
    from .analysis.explanation import table
    from .tools import load as models
    from .tools.demo import run_demo, write_demo
    from .tools.metrics import NearestPicture

    call = _pipeline_call(arguments)
    pipe, known = models.load(arguments.pipeline), None
    if arguments.pipeline == "emoji":
        pictures = models.emoji_pictures()
        known = NearestPicture(pictures.captions, pictures.images)
    demo = run_demo(pipe, seed=arguments.seed, known=known, **call)
    with patched(pipe, config=call["config"]):
        explanation = explain(pipe)
    write_demo(demo, arguments.out, explanation.as_dict())
    print(explanation, "\n")
    print("\n".join(table(*demo.prompt_table())), "\n")
    print("\n".join(table(*demo.time_table())))
    print(f"\npag_fast is {demo.speedup:.2f}× as fast as stock PAG")
    print(f"pictures side by side: {arguments.out / 'demo.png'}")


def _bench(arguments: argparse.Namespace) -> None:
    from .tools import load as models
    from .tools.bench import Results, bench_pipeline, write
    from .tools.bench.record import machine
    from .tools.bench.report import plot, user_table
    from .tools.output import without_matplotlib

    call = _pipeline_call(arguments)
    pipe = models.load(arguments.pipeline)
    name = models.name_of(arguments.pipeline)
    rows = bench_pipeline(pipe, name=name, compiled=arguments.compile, **call)
    here = machine(pipe.device.type)
    write(Results(here, rows), arguments.out / "bench.json")
    files = [arguments.out / "bench.json"]
    lacking = without_matplotlib()
    if not lacking:
        files.append(arguments.out / "bench.png")
        plot(rows, files[-1], title=f"{here['chip']}, {rows[0].dtype}")
    print("\n".join(user_table(rows)))
    print("\nmedians of rounds in turns; × is how many times as fast as that variant")
    print(", ".join(map(str, files)))
    if lacking:
        print(f"There is no picture. {lacking}")


def _verify(arguments: argparse.Namespace) -> int:
    from .analysis.verify import verify
    from .pipelines.registry import has_layers
    from .tools import load as models
    from .tools.output import files_first, write_json

    call = given(
        arguments,
        prompt="prompt",
        steps="num_inference_steps",
        guidance_scale="guidance_scale",
        pag_scale="pag_scale",
    )
    pipe = models.load(arguments.pipeline, models.dtype_of(arguments.dtype), as_saved=True)
    if not has_layers(pipe):
        del call["pag_scale"]
    pipe.set_progress_bar_config(disable=True)
    result = verify(pipe, layers=arguments.layers, **call)
    with files_first(result):
        if arguments.json is not None:
            write_json(arguments.json, result.as_dict())
    return 0 if result.ok else 1


def _describe(arguments: argparse.Namespace) -> None:
    from .analysis.described import describe_by_call
    from .tools import load as models
    from .tools.output import files_first

    call = given(
        arguments,
        prompt="prompt",
        steps="num_inference_steps",
        height="height",
        width="width",
    )
    pipe = models.load(arguments.pipeline, as_saved=True)
    pipe.set_progress_bar_config(disable=True)
    found = describe_by_call(pipe, arguments.layers, **call)
    with files_first(found):
        if arguments.write is not None and found.sources:
            arguments.write.write_text("\n\n".join(found.sources.values()), encoding="utf-8")
    if arguments.write is None:
        return
    if not found.sources:
        raise ValueError("Nothing was written: every denoiser of this pipeline is described.")
    print(f"\n{arguments.write}: put it into pag_fast/models, and see CONTRIBUTING.md")


def _env(arguments: argparse.Namespace) -> None:
    from .tools.environment import environment

    print("\n".join(environment()))


if __name__ == "__main__":
    sys.exit(main())
