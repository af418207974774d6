"""Commands that count and run nothing: ``pag-fast layers``, ``explain`` and ``ledger``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cli_options import add_json, add_pipeline, add_plot, add_size, given

_UNSEEN = "fewer launches, and what others put on the model, are seen with weights: explain(pipe)"


def add_commands(commands: Any) -> None:
    """Add the subcommands to those of ``pag-fast``."""
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
    add_size(layers, "height", "width", "frames")
    add_json(layers, "the costs")
    add_plot(layers, "draw the costs of all layers")
    layers.set_defaults(run=_layers)

    explain = commands.add_parser(
        "explain", help="what a patched pipeline runs: branches, rows, FLOPs; from configurations"
    )
    add_pipeline(explain)
    add_size(explain, "height", "width", "frames")
    add_json(explain, "all of it")
    add_plot(explain, "draw branches, rows and FLOPs")
    explain.set_defaults(run=_explain)

    ledger = commands.add_parser(
        "ledger", help="FLOPs of a step for every pipeline at full size: stock, patched, bound"
    )
    ledger.add_argument("pipelines", nargs="*", help="class names; omitted, all of them")
    add_json(ledger, "the rows")
    ledger.set_defaults(run=_ledger)


def _layers(arguments: argparse.Namespace) -> None:
    from .analysis.costs import layer_costs
    from .analysis.published import CARDS, known_names
    from .patching import supported_pipelines

    if arguments.model is None:
        here = {*supported_pipelines(), *CARDS}
        print("\n".join(name for name in known_names() if name in here))
        print("\npag-fast layers MODEL lists the layers of one.")
        return
    size = given(arguments, height="height", width="width", frames="frames")
    costs = layer_costs(_pipeline(arguments.model), cfg=arguments.cfg == "on", **size)
    _keep(arguments, costs, "layers_figure", costs.table(every=arguments.all))


def _explain(arguments: argparse.Namespace) -> None:
    from . import explain, patched
    from .tools import load as models

    name = arguments.pipeline
    pipe = models.emoji() if name == "emoji" else models.skeleton(name)
    size = given(arguments, height="height", width="width", frames="frames")
    with patched(pipe, arguments.layers):
        explanation = explain(pipe, **size)
    if name != "emoji":
        # of weights that are not there it would say that they are offloaded
        explanation = replace(
            explanation, findings=(), launches=(), notes=(*explanation.notes, _UNSEEN)
        )
    _keep(arguments, explanation, "explanation_figure", explanation)


def _keep(arguments: argparse.Namespace, shown: Any, figure: str, report: object) -> None:
    """Print a report, and write what it shows as JSON and as a picture, where that is asked for."""
    from .tools.output import files_first, write_json

    with files_first(report):
        if arguments.json is not None:
            write_json(arguments.json, shown.as_dict())
        if arguments.plot is not None:
            from .tools import plots

            plots.save(getattr(plots, figure)(shown), arguments.plot)


def _pipeline(model: str) -> Any:
    """What ``layer_costs`` takes: a pipeline, or the name of one."""
    from .pipelines.registry import PIPELINES
    from .tools import load as models

    if model == "emoji":
        return models.emoji()
    named = any(model == entry.name for entry in PIPELINES)
    is_source = not named and (Path(model).exists() or "/" in model)
    return models.skeleton(model) if is_source else model


def _ledger(arguments: argparse.Namespace) -> None:
    from .analysis.explanation import flops_table, flops_unit
    from .analysis.ledger import ledger
    from .tools.output import files_first, write_json

    entries = []
    for entry in ledger(arguments.pipelines or None):
        entries.append(entry)
        print(f"counted {entry.label}", file=sys.stderr)
    costs = [(entry.label, entry.cost) for entry in entries]
    unit = flops_unit(costs)
    head = f"{unit} per step and image, matrix products, convolutions and attention"
    with files_first("\n".join([head, "", *flops_table(costs, "pipeline")])):
        if arguments.json is not None:
            write_json(arguments.json, [entry.as_dict() for entry in entries])
