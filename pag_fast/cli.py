"""The command line: ``pag-fast layers | ledger | demo | bench | generate | verify | ...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli_generate import add_command as add_generate
from .settings.checks import number, whole_number
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Bad input, and files that cannot be read or written, end with a sentence on standard error and
    status 2.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        _check_outputs(arguments)
        return int(arguments.run(arguments) or 0)
    except (ValueError, OSError) as error:
        print(f"pag-fast: {error}", file=sys.stderr)
        return 2


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises ValueError for files and folders that could not be written after minutes of work."""
    folder = getattr(arguments, "out", None)
    for option in ("json", "write"):
        file = getattr(arguments, option, None)
        if file is None:
            continue
        if file.is_dir():
            raise ValueError(f"--{option} names a file to write, and {file} is a folder.")
        if not file.parent.is_dir():
            raise ValueError(f"The folder of --{option} {file} does not exist: make it first.")
        _check_writable(file if file.exists() else file.parent, f"--{option}")
    if folder is not None:
        # it is made where it does not exist
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"--out {folder} cannot be a folder, as {there} is a file.")
        _check_writable(there, "--out")


def _check_writable(path: Path, option: str) -> None:
    if not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {path} cannot be written to: choose another place.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pag-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pag_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    layers = commands.add_parser(
        "layers", help="layers PAG can perturb in a pipeline, and what PAG costs on each"
    )
    layers.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a pipeline's class name for its published size, a folder or hub id of a pipeline "
        '(its configurations alone are read), or "emoji"; omitted, the known names',
    )
    layers.add_argument("--cfg", choices=("on", "off"), default="on", help="guidance: on or off")
    layers.add_argument("--all", action="store_true", help="a line for each layer of a transformer")
    layers.add_argument("--height", type=int, help="pixels; omitted, the model's own")
    layers.add_argument("--width", type=int)
    layers.add_argument("--frames", type=int, help="of a video")
    layers.add_argument("--json", type=Path, help="write the costs to this file too")
    layers.set_defaults(run=_layers)

    ledger = commands.add_parser(
        "ledger", help="FLOPs of a step for every pipeline at full size: stock, patched, bound"
    )
    ledger.add_argument("pipelines", nargs="*", help="class names; omitted, all of them")
    ledger.add_argument("--json", type=Path, help="write the rows to this file too")
    ledger.set_defaults(run=_ledger)

    demo = commands.add_parser(
        "demo", help="without PAG, stock PAG and patched PAG: time and pictures, no download"
    )
    _pipeline_options(demo, "demo", steps=20, rounds=3)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", help="time a pipeline without PAG, with stock PAG and patched, in turns"
    )
    _pipeline_options(bench, "bench", steps=10, rounds=5)
    bench.add_argument("--compile", action="store_true", help="under torch.compile too")
    bench.set_defaults(run=_bench)

    add_generate(commands)
    _verify_options(commands)
    _describe_options(commands)

    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.set_defaults(run=_env)
    return parser


def _verify_options(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="one call stock and one patched: do they differ? For a bug report"
    )
    verify.add_argument(
        "--pipeline",
        default="emoji",
        metavar="PATH_OR_HUB_ID",
        help="a pipeline of your own; omitted, the small one that ships with pag_fast",
    )
    verify.add_argument("--layers", nargs="+", help="omitted, the pipeline's own")
    verify.add_argument("--prompt", default="red apple")
    verify.add_argument("--steps", type=int, default=4, help="of either call")
    verify.add_argument("--guidance-scale", type=float, help="omitted, the pipeline's own")
    verify.add_argument("--pag-scale", type=float, default=3.0)
    verify.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="omitted, fp16 on an accelerator; fp32 tells small faults from rounding",
    )
    verify.add_argument("--json", type=Path, help="write the result to this file too")
    verify.set_defaults(run=_verify)


def _describe_options(commands: Any) -> None:
    command = commands.add_parser(
        "describe",
        help="what is known of a pipeline and its denoiser; of unknown ones, what a call shows",
    )
    command.add_argument(
        "--pipeline",
        default="emoji",
        metavar="PATH_OR_HUB_ID",
        help="a pipeline of any class; omitted, the small one that ships with pag_fast",
    )
    command.add_argument("--layers", nargs="+", help="omitted, one in the middle")
    command.add_argument("--prompt", default="red apple")
    command.add_argument("--steps", type=int, default=2, help="of the call")
    command.add_argument("--height", type=int, help="pixels; omitted, the pipeline's own")
    command.add_argument("--width", type=int)
    command.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="a file for pag_fast/models that describes the denoiser, to contribute",
    )
    command.set_defaults(run=_describe)


def _pipeline_options(
    command: argparse.ArgumentParser, out: str, *, steps: int, rounds: int
) -> None:
    command.add_argument(
        "--pipeline",
        default="emoji",
        metavar="PATH_OR_HUB_ID",
        help="a text-to-image model of your own; omitted, the small one that ships with pag_fast",
    )
    command.add_argument("--prompt", action="append", help="may be given several times")
    command.add_argument("--steps", type=int, default=steps, help="of one call")
    command.add_argument("--batch", type=int, help="prompts per call: 8, with your own model 1")
    command.add_argument("--rounds", type=int, default=rounds, help="how often everything is timed")
    command.add_argument("--layers", nargs="+", help="omitted, the pipeline's own")
    command.add_argument(
        "--guidance-scale", type=float, help="1 is off; 2 if omitted, 5 with a model of your own"
    )
    command.add_argument("--pag-scale", type=float, default=3.0)
    command.add_argument("--out", type=Path, default=Path(out), help="folder for picture and JSON")


def _pipeline_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`_pipeline_options` say, for ``run_demo`` and ``bench_pipeline``."""
    from .config import PatchConfig
    from .tools.demo import PROMPTS

    shipped = arguments.pipeline == "emoji"
    scale, batch = arguments.guidance_scale, arguments.batch
    if scale is not None:
        scale = number("--guidance-scale", scale, least=0.0)
    return {
        "prompts": arguments.prompt or PROMPTS,
        "steps": arguments.steps,
        "guidance_scale": (2.0 if shipped else 5.0) if scale is None else scale,
        "pag_scale": number("--pag-scale", arguments.pag_scale, least=0.0),
        "batch": (8 if shipped else 1) if batch is None else batch,
        "rounds": arguments.rounds,
        "config": PatchConfig(layers=arguments.layers),
    }


def _layers(arguments: argparse.Namespace) -> None:
    from .analysis.costs import layer_costs
    from .analysis.published import CARDS
    from .patching import supported_pipelines
    from .pipelines.registry import HOSTS, SAG_PIPELINES, STOCK_PIPELINES
    from .tools import load as models

    model = arguments.model
    if model is None:
        without = (*SAG_PIPELINES, *STOCK_PIPELINES)
        names = [name for name in supported_pipelines() if name not in without]
        print("\n".join(dict.fromkeys([*names, *CARDS])))
        print("\npag-fast layers MODEL lists the layers of one.")
        return
    pipe = model
    if model == "emoji":
        pipe = models.emoji()
    elif model not in CARDS and model not in HOSTS and (Path(model).is_dir() or "/" in model):
        pipe = models.skeleton(model)
    size = {"height": arguments.height, "width": arguments.width, "frames": arguments.frames}
    costs = layer_costs(pipe, cfg=arguments.cfg == "on", **size)
    print(costs.table(every=arguments.all))
    if arguments.json is not None:
        text = json.dumps(costs.as_dict(), indent=2, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def _ledger(arguments: argparse.Namespace) -> None:
    from .analysis.explanation import flops_table
    from .analysis.ledger import ledger

    entries = []
    for entry in ledger(arguments.pipelines or None):
        entries.append(entry)
        print(f"counted {entry.label}", file=sys.stderr)
    print("TFLOPs per step and image, matrix products, convolutions and attention\n")
    print("\n".join(flops_table([(entry.label, entry.cost) for entry in entries], "pipeline")))
    if arguments.json is not None:
        rows = [entry.as_dict() for entry in entries]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _demo(arguments: argparse.Namespace) -> None:
    from . import explain, patched
    from .analysis.explanation import table
    from .tools import load as models
    from .tools.demo import run_demo, write_demo
    from .tools.metrics import NearestPicture

    seed = whole_number("--seed", arguments.seed, least=0, most=2**63 - 1)
    call = _pipeline_call(arguments)
    pipe, known = models.load(arguments.pipeline), None
    if arguments.pipeline == "emoji":
        pictures = models.emoji_pictures()
        known = NearestPicture(pictures.captions, pictures.images)
    demo = run_demo(pipe, seed=seed, known=known, **call)
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
    from .tools.bench.report import plot, require_matplotlib, user_table

    require_matplotlib()
    call = _pipeline_call(arguments)
    pipe = models.load(arguments.pipeline)
    name = models.name_of(arguments.pipeline)
    rows = bench_pipeline(pipe, name=name, compiled=arguments.compile, **call)
    here = machine(pipe.device.type)
    write(Results(here, rows), arguments.out / "bench.json")
    plot(rows, arguments.out / "bench.png", title=f"{here['chip']}, {rows[0].dtype}")
    print("\n".join(user_table(rows)))
    print("\nmedians of rounds in turns; × is how many times as fast as that variant")
    print(f"{arguments.out / 'bench.json'}, {arguments.out / 'bench.png'}")


def _verify(arguments: argparse.Namespace) -> int:
    from .analysis.verify import verify
    from .pipelines.registry import has_layers
    from .tools import load as models

    scale = arguments.guidance_scale
    call: dict[str, Any] = {
        "prompt": arguments.prompt,
        "num_inference_steps": whole_number("--steps", arguments.steps, least=1),
        "pag_scale": number("--pag-scale", arguments.pag_scale, least=0.0),
    }
    if scale is not None:
        call["guidance_scale"] = number("--guidance-scale", scale, least=0.0)
    pipe = models.load(arguments.pipeline, models.dtype_of(arguments.dtype), as_saved=True)
    if not has_layers(pipe):
        del call["pag_scale"]
    pipe.set_progress_bar_config(disable=True)
    result = verify(pipe, layers=arguments.layers, **call)
    print(result)
    if arguments.json is not None:
        text = json.dumps(result.as_dict(), indent=2, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result.ok else 1


def _describe(arguments: argparse.Namespace) -> None:
    from .analysis.described import describe_by_call
    from .tools import load as models

    call: dict[str, Any] = {
        "prompt": arguments.prompt,
        "num_inference_steps": whole_number("--steps", arguments.steps, least=2),
    }
    for name in ("height", "width"):
        if getattr(arguments, name) is not None:
            call[name] = whole_number(f"--{name}", getattr(arguments, name), least=1)
    pipe = models.load(arguments.pipeline, as_saved=True)
    pipe.set_progress_bar_config(disable=True)
    found = describe_by_call(pipe, arguments.layers, **call)
    print(found)
    if arguments.write is None:
        return
    if not found.sources:
        raise ValueError("Nothing was written: every denoiser of this pipeline is described.")
    arguments.write.write_text("\n\n".join(found.sources.values()), encoding="utf-8")
    print(f"\n{arguments.write}: put it into pag_fast/models, and see CONTRIBUTING.md")


def _env(arguments: argparse.Namespace) -> None:
    from .tools.environment import environment

    print("\n".join(environment()))


if __name__ == "__main__":
    sys.exit(main())
