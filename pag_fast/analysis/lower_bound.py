"""The least FLOPs of a step with PAG, derived from a trace of the unmodified model.

Not from the plan: every module counts once for every branch in which its input differs. The
perturbed branch differs from the first perturbed layer on, uncond differs from the first module on
that sees its text, text keys and values never differ between cond and perturbed, and the identity
needs no scores.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.module_tracker import ModuleTracker

from ..models.inputs import Inputs
from ..models.layer_names import resolve
from ..models.registry import find
from ..sharing.plan import class_name
from .counter import FlopCounter


@dataclass(frozen=True)
class Traced:
    """FLOPs of one module in a forward pass of one row, its children not included."""

    name: str
    flops: int


def trace(model: Any, inputs: Inputs) -> list[Traced]:
    """FLOPs of every module for one row, in the order in which the modules first compute."""
    with torch.no_grad(), ModuleTracker() as tracker, FlopCounter(tracker) as counter:
        model(**inputs(1), return_dict=False)
    root = type(model).__name__
    totals = {
        name.removeprefix(root).lstrip("."): flops
        for name, flops in counter.modules.items()
        if name != "Global"
    }
    own = dict(totals)
    for name, flops in totals.items():
        if name:
            own[name.rpartition(".")[0]] = own.get(name.rpartition(".")[0], 0) - flops
    # containers such as ModuleList are never called: what their children did belongs further up
    known = {name: flops for name, flops in own.items() if name in totals}
    for name in [n for n in own if n not in totals]:
        parent = name
        while parent and parent not in totals:
            parent = parent.rpartition(".")[0]
        known[parent] = known.get(parent, 0) + own[name]
    return [Traced(name, flops) for name, flops in known.items() if flops]


def row_flops(traced: Sequence[Traced]) -> int:
    """FLOPs of one row in one forward pass."""
    return sum(item.flops for item in traced)


def lower_bound(
    model: Any,
    traced: Sequence[Traced],
    layers: Any,
    inputs: Inputs,
    *,
    cfg: bool,
    exact: bool = False,
) -> int:
    """The least FLOPs of a step with PAG on ``layers``; ``()`` for a ControlNet.

    ``cfg``: the call holds uncond and cond.
    """
    found = resolve(model, layers, exact=exact) if layers else ()
    return Bound(model, inputs, cfg=cfg).total(traced, found)


# modules that see nothing but the timestep or the control image, and nothing but the text
_STEP_ONLY = ("time_embedding", "adaln_single", "time_embed", "controlnet_cond_embedding")
_TEXT_ONLY = ("caption_projection", "context_embedder", "text_embedder", "encoder_hid_proj")
# in a block with two streams
_TEXT_STREAM = ("ff_context", "txt_mlp")
# where text and image are one sequence, through the same weights
_ONE_SEQUENCE = {
    "ChromaTransformer2DModel": ("single_transformer_blocks.",),
    "CogVideoXTransformer3DModel": ("transformer_blocks.",),
    "CogView4Transformer2DModel": ("transformer_blocks.",),
    "Flux2Transformer2DModel": ("single_transformer_blocks.",),
    "FluxTransformer2DModel": ("single_transformer_blocks.",),
    "HunyuanVideoTransformer3DModel": ("single_transformer_blocks.",),
    "Krea2Transformer2DModel": ("transformer_blocks.",),
    "Lumina2Transformer2DModel": ("layers.",),
    "ZImageTransformer2DModel": ("layers.",),
}
_TWO_STREAMS = (
    "HunyuanVideo15Transformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
)
# uncond and cond are one until the first cross-attention
_TEXT_BY_CROSS_ATTENTION = (
    "LTXVideoTransformer3DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
)


class Bound:
    """Sums a trace, each module times the number of branches that differ there."""

    def __init__(self, model: Any, inputs: Inputs, *, cfg: bool) -> None:
        self.model = model
        self.prompts = 2 if cfg else 1
        self.joint = _joint_tokens(model, inputs(1))
        self.cross = {name for name, module in model.named_modules() if _is_cross(name, module)}
        kind, config = class_name(model), model.config
        self.one_sequence = _ONE_SEQUENCE.get(kind, ())
        self.text_first = kind in _TEXT_BY_CROSS_ATTENTION or (
            "down_block_types" in config and config.get("addition_embed_type") is None
        )

    def total(self, traced: Sequence[Traced], perturbed: Collection[str]) -> int:
        """The sum, with PAG on the attentions named in ``perturbed``."""
        owners = self.cross.union(perturbed)
        fork = next((item.name for item in traced if item.name in perturbed), "")
        total, entered, forked, text_seen = 0, False, False, not self.text_first
        for item in traced:
            head, part = _split(item.name, owners)
            if head in self.cross and part == "to_out":
                text_seen = True  # behind the first scores over text, uncond and cond differ
            prompts = self.prompts if text_seen else 1
            if head and head == fork:
                entered = True
                total += self._fork(item, part, prompts)
                continue
            forked = entered
            if head in perturbed:
                total += self._perturbed(item, head, part)
            else:
                total += self._plain(item, head, part, prompts, fork if forked else "")
        return total

    def _plain(self, item: Traced, head: str, part: str, prompts: int, forked: str) -> int:
        """A module that is not perturbed itself; ``forked`` names the fork if that is over."""
        name = item.name
        if name.startswith(_STEP_ONLY):
            return item.flops
        if name.split(".")[0] in _TEXT_ONLY or part in ("to_k", "to_v"):
            return item.flops * self.prompts
        if name == head:  # scores over the text
            return item.flops * (self.prompts + bool(forked))
        block = forked.rpartition(".")[0]
        if forked and self.joint and name.startswith(f"{block}."):
            # the text of cond and perturbed leaves the forking block's attention unchanged
            if name[len(block) + 1 :].startswith(_TEXT_STREAM):
                return item.flops * self.prompts
            return item.flops * prompts + self._image(item)
        return item.flops * (prompts + bool(forked))

    def _fork(self, item: Traced, part: str, prompts: int) -> int:
        if part == "to_out":
            return item.flops * prompts + self._image(item)
        own = self._own_and_text(item) if not part and self._has_text(item.name) else 0
        return item.flops * prompts + own

    def _perturbed(self, item: Traced, head: str, part: str) -> int:
        if self._has_text(head):
            if part:
                return item.flops * (self.prompts + 1)
            assert self.joint is not None
            image, text = self.joint
            text_queries = item.flops * text // (image + text)
            return item.flops * self.prompts + self._own_and_text(item) + text_queries
        skipped = part in ("to_q", "to_k") or not part
        return item.flops * (self.prompts if skipped else self.prompts + 1)

    def _has_text(self, name: str) -> bool:
        if self.joint is None or name.startswith(self.one_sequence or "-"):
            return self.joint is not None
        module = self.model.get_submodule(name)
        return getattr(module, "add_q_proj", None) is not None

    def _image(self, item: Traced) -> int:
        """The part of a module's work that is on image tokens."""
        if self.joint is None or not item.name.startswith(self.one_sequence or "-"):
            return item.flops
        image, text = self.joint
        return item.flops * image // (image + text)

    def _own_and_text(self, item: Traced) -> int:
        assert self.joint is not None
        image, text = self.joint
        return item.flops * image * text // (image + text) ** 2


def _is_cross(name: str, module: Any) -> bool:
    if not hasattr(module, "processor"):
        return False
    # LTX's attentions do not say what they are
    return bool(getattr(module, "is_cross_attention", name.endswith(".attn2")))


def _split(name: str, owners: Collection[str]) -> tuple[str, str]:
    """The attention a module belongs to (``""`` if none) and its part, such as ``to_q``."""
    head, part = name, ""
    while head:
        if head in owners:
            return head, part
        head, _, part = head.rpartition(".")
    return "", ""


def _joint_tokens(model: Any, call: dict[str, Any]) -> tuple[int, int] | None:
    """``(image, text)`` tokens of a model with joint attention, else ``None``."""
    found = find(model)  # ControlNets are counted, too
    if found is not None and found.tokens is not None:
        before, image, behind = found.tokens(model, call)[0]
        return image, before + behind
    kind = class_name(model)
    if kind not in _ONE_SEQUENCE and kind not in _TWO_STREAMS:
        return None
    sample, text = call["hidden_states"], call["encoder_hidden_states"].shape[1]
    # HunyuanVideo 1.5 has three encoders
    more = [call.get(name) for name in ("encoder_hidden_states_2", "image_embeds")]
    text += sum(x.shape[1] for x in more if x is not None)
    if sample.ndim == 3:  # packed by the pipeline
        return sample.shape[1], text
    config = model.config
    image = (sample.shape[-2] // config.patch_size) * (sample.shape[-1] // config.patch_size)
    if sample.ndim == 5:
        frames = sample.shape[1 if kind.startswith("CogVideoX") else 2]
        image *= frames // (config.get("patch_size_t") or 1)
    return image, text
