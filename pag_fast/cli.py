"""The command line: ``pag-fast layers | ledger | demo | env``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; bad input ends with a sentence on standard error and exit status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"pag-fast: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pag-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pag_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    layers = commands.add_parser(
        "layers", help="layers PAG can perturb in a pipeline, and what PAG costs on each"
    )
    layers.add_argument("pipeline", nargs="?", help="class name; omitted, the supported ones")
    layers.add_argument("--no-cfg", action="store_true", help="without classifier-free guidance")
    layers.set_defaults(run=_layers)

    ledger = commands.add_parser(
        "ledger", help="FLOPs of a step for every pipeline at full size: stock, patched, bound"
    )
    ledger.add_argument("pipelines", nargs="*", help="class names; omitted, all of them")
    ledger.add_argument("--json", type=Path, help="write the rows to this file too")
    ledger.set_defaults(run=_ledger)

    demo = commands.add_parser("demo", help="stock against patched on a small SDXL, no download")
    demo.add_argument("--prompt", action="append", help="may be given several times")
    demo.add_argument("--steps", type=int, default=6)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--layers", nargs="+", default=["mid"])
    demo.add_argument("--guidance-scale", type=float, default=6.0)
    demo.add_argument("--pag-scale", type=float, default=3.0)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for picture and JSON")
    demo.set_defaults(run=_demo)

    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.set_defaults(run=lambda arguments: print("\n".join(environment())))
    return parser


def _layers(arguments: argparse.Namespace) -> None:
    from .explain import table
    from .flops import layer_costs
    from .ledger import card_inputs, find_card
    from .patching import supported_pipelines
    from .zoo import meta_model

    if arguments.pipeline is None:
        print("\n".join(supported_pipelines()))
        print("\npag-fast layers PIPELINE lists the layers of one.")
        return
    card = find_card(arguments.pipeline)
    model = meta_model(card, "denoiser")
    cfg = not arguments.no_cfg
    costs = layer_costs(model, card_inputs(card, model), cfg=cfg)
    print(f"{card.pipeline}, {card.checkpoint}, {card.height}×{card.width}; a step with PAG there,")
    print(f"in steps of {'classifier-free guidance' if cfg else 'no guidance'} without PAG:\n")
    rows = [(c.name, f"{c.over_cfg:.3f}×", f"{c.stock_over_cfg:.3f}×") for c in costs]
    print("\n".join(table(("layer", "branches shared", "stock"), rows)))


def _ledger(arguments: argparse.Namespace) -> None:
    from .explain import flops_table
    from .ledger import ledger

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
    from .config import PatchConfig
    from .demo import PROMPTS, median_speedup, run_demo, small_sdxl
    from .explain import table

    config = PatchConfig(layers=arguments.layers)
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1; got {arguments.steps}.")
    pipe = small_sdxl(seed=0)
    with patched(pipe, config=config):
        print(explain(pipe), "\n", flush=True)
    shots = run_demo(
        pipe,
        arguments.prompt or PROMPTS,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        pag_scale=arguments.pag_scale,
        seed=arguments.seed,
        out=arguments.out,
        config=config,
        stretch=True,
    )
    rows = [
        (
            s.prompt,
            f"{s.stock:.3f}",
            f"{s.patched:.3f}",
            f"{s.speedup:.2f}×",
            f"{s.largest_difference:.1e}",
            str(s.largest_pixel_difference),
        )
        for s in shots
    ]
    header = ("prompt", "s/step stock", "s/step patched", "speed-up", "latents differ", "pixels")
    print()
    print("\n".join(table(header, rows)))
    print(f"\nmedian speed-up {median_speedup(shots):.2f}×")
    print(f"pictures side by side: {arguments.out / 'demo.png'}")


def environment() -> list[str]:
    """Lines that tell what pag_fast runs on."""
    import torch

    lines = [f"pag_fast {__version__}", f"python {platform.python_version()} {platform.platform()}"]
    for package in ("torch", "triton", "diffusers", "transformers", "accelerate", "peft"):
        lines.append(f"{package} {_version(package)}")
    lines.append(f"kernels {'installed' if _has_kernels() else 'not installed'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(f"device {index}: {properties.name}, {memory:.0f} GiB")
    else:
        lines.append(f"device: CPU, {torch.get_num_threads()} threads")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _has_kernels() -> bool:
    return importlib.util.find_spec("pag_fast_kernels") is not None


if __name__ == "__main__":
    sys.exit(main())
