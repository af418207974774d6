"""Whose prompt a forward gets, seen in the denoising loop that calls it."""

from __future__ import annotations

from typing import Any

import torch

from ...models.registry import COND, UNCOND


def pass_of_text(loop: Any, call: dict[str, Any]) -> str:
    """The pass whose prompt, among the locals of the loop, is the text of this forward.

    Returns:
        ``""`` where neither is, or both are one tensor, which tells nothing.
    """
    text = call.get("encoder_hidden_states")
    if not isinstance(text, torch.Tensor):
        return ""
    found: list[str] = []
    address = text.data_ptr()
    for name, branch in (("negative_prompt_embeds", UNCOND), ("prompt_embeds", COND)):
        embeds = loop[name] if name in loop else None  # noqa: SIM401
        # a negative prompt may be a view of the prompt
        if (
            isinstance(embeds, torch.Tensor)
            and embeds.shape == text.shape
            and embeds.data_ptr() == address
        ):
            found += [branch]
    return found[0] if len(found) == 1 else ""
