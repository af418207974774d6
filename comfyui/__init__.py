"""Perturbed-Attention Guidance for ComfyUI that computes nothing twice."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"


class PagFastExtension(ComfyExtension):
    """The nodes of this pack, and what they replace."""

    async def on_load(self) -> None:
        """Register the replacements of another pack's nodes."""
        from comfy_api.latest import ComfyAPI
        from server import PromptServer

        from .replacements import rename, replacements

        for replacement in replacements():
            await ComfyAPI().node_replacement.register(replacement)
        PromptServer.instance.add_on_prompt_handler(rename)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes."""
        return NODES


async def comfy_entrypoint() -> PagFastExtension:
    """What ComfyUI calls when it loads the pack."""
    return PagFastExtension()
