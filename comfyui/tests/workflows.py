"""What the browser does with a workflow: replaces nodes that are missing, and makes a prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headless

EXAMPLES = headless.PACK / "example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
NOTES = ("Note", "MarkdownNote")  # nodes of the browser alone
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
Info = Callable[[str], dict[str, Any]]  # a node's schema, by its name


def load(name: str) -> dict[str, Any]:
    """An example workflow of the pack."""
    return json.loads(Path(EXAMPLES, f"{name}.json").read_text(encoding="utf-8"))


def inputs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Type and options of a node's inputs, in the order in which they are shown."""
    given = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in given.items()}


def widgets(info: dict[str, Any]) -> list[str]:
    """The values that are saved for a node, by name; "" for what only the browser uses."""
    out = []
    for name, (kind, options) in inputs(info).items():
        if isinstance(kind, list) or (kind in WIDGETS and not options.get("forceInput")):
            out.append(name)
            if options.get("control_after_generate"):
                out.append("")
    return out


def to_prompt(workflow: dict[str, Any], info: Info) -> headless.Flow:
    """The prompt that the browser queues; ``ValueError`` for values or links that do not fit."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: link for link in workflow["links"]}
    out: headless.Flow = {}
    for number, node in nodes.items():
        schema = info(node["type"])
        names, values = widgets(schema), node.get("widgets_values", [])
        if len(names) != len(values):
            raise ValueError(f"{node['type']} has {names}, and {values} are saved.")
        given = {name: value for name, value in zip(names, values, strict=True) if name}
        for slot, place in enumerate(node["inputs"]):
            if place["link"] is None:
                continue
            _, origin, output, target, target_slot, kind = links[place["link"]]
            sends = info(nodes[origin]["type"])["output"][output]
            takes = inputs(schema)[place["name"]][0]
            if (target, target_slot, sends, takes) != (number, slot, kind, kind):
                raise ValueError(f"Link {place['link']} does not lead to {place['name']}.")
            given[place["name"]] = [str(origin), output]
        out[str(number)] = {
            "class_type": node["type"],
            "inputs": given,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return out


def new_node(kind: str, info: Info) -> dict[str, Any]:
    """A node as the browser makes it: inputs unlinked, widgets at their defaults."""
    schema = info(kind)
    defaults = {name: options.get("default") for name, (_, options) in inputs(schema).items()}
    return {
        "type": kind,
        "inputs": [
            {"name": name, "type": spec[0], "link": None} for name, spec in inputs(schema).items()
        ],
        "outputs": [{"name": name, "links": []} for name in schema["output_name"]],
        "widgets_values": [defaults.get(name) for name in widgets(schema)],
    }


def replace(workflow: dict[str, Any], replacements: dict[str, Any], info: Info) -> dict[str, Any]:
    """The workflow with nodes replaced as the browser does it (useNodeReplacement.ts)."""
    workflow = copy.deepcopy(workflow)
    links = {link[0]: link for link in workflow["links"]}
    for place, old in enumerate(workflow["nodes"]):
        if old["type"] not in replacements:
            continue
        (entry,) = replacements[old["type"]]
        new = new_node(entry["new_node_id"], info)
        new["id"] = old["id"]
        for mapping in entry["input_mapping"]:
            _connect(old, mapping["old_id"], new, mapping["new_id"], links)
            _transfer(old, entry, mapping, new, widgets(info(new["type"])))
        for mapping in entry["output_mapping"]:
            for link in old["outputs"][mapping["old_idx"]]["links"]:
                links[link][2] = mapping["new_idx"]
        workflow["nodes"][place] = new
    return workflow


def _connect(
    old: dict[str, Any], theirs: str, new: dict[str, Any], ours: str, links: dict[int, list[Any]]
) -> None:
    linked = [slot for slot in old["inputs"] if slot["name"] == theirs and slot["link"] is not None]
    names = [slot["name"] for slot in new["inputs"]]
    if linked and ours in names:
        new["inputs"][names.index(ours)]["link"] = linked[0]["link"]
        links[linked[0]["link"]][4] = names.index(ours)


def _transfer(
    old: dict[str, Any], entry: dict[str, Any], mapping: dict[str, Any], new: dict[str, Any],
    names: list[str],
) -> None:  # fmt: skip
    ids, values = entry["old_widget_ids"], old["widgets_values"]
    if mapping["old_id"] in ids and mapping["new_id"] in names:
        place = ids.index(mapping["old_id"])
        if place < len(values):
            new["widgets_values"][names.index(mapping["new_id"])] = values[place]
