"""Workflows saved with sd-perturbed-attention's nodes load with these where it is not installed."""

from __future__ import annotations

from typing import Any

SHARED = [
    "unet_block",
    "unet_block_id",
    "sigma_start",
    "sigma_end",
    "rescale",
    "rescale_mode",
    "unet_block_list",
]
# theirs: (ours, their widgets in their order)
REPLACED = {
    "PerturbedAttention": ("PagFastPAGAdvanced", ["scale", "adaptive_scale", *SHARED]),
    "SmoothedEnergyGuidanceAdvanced": ("PagFastSEG", ["scale", "blur_sigma", *SHARED]),
}


def replacements() -> list[Any]:
    """One ``NodeReplace`` for each of their nodes: inputs keep their names.

    The browser reads these when a workflow is opened.
    """
    from comfy_api.latest import io

    return [
        io.NodeReplace(
            new_node_id=ours,
            old_node_id=theirs,
            old_widget_ids=list(widgets),
            input_mapping=[{"new_id": name, "old_id": name} for name in ("model", *widgets)],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )
        for theirs, (ours, widgets) in REPLACED.items()
    ]


def rename(request: dict[str, Any]) -> dict[str, Any]:
    """The body of a request to ``/prompt``, with our names for their nodes.

    ComfyUI asks this before it replaces nodes itself, which fails with ``KeyError`` where a prompt
    leaves an optional input out, or the title of a node. Inputs and output have the same names, so
    that the name of the node is all there is to replace.
    """
    import nodes  # ComfyUI's

    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        theirs = node.get("class_type") if isinstance(node, dict) else None
        if theirs in REPLACED and theirs not in nodes.NODE_CLASS_MAPPINGS:
            node["class_type"] = REPLACED[theirs][0]
    return request
