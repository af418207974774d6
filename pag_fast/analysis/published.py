"""Published configurations of the models behind the pipelines, without their weights.

The ledger builds them on the meta device; :mod:`pag_fast.models.inputs` makes the arguments with
which diffusers' pipelines call them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.description import Checkpoint
from ..models.inputs import Size
from ..models.registry import DESCRIPTIONS, describe, find, is_derived, keep_traced
from ..pipelines.registry import HOSTS, PAG_PIPELINES, PIPELINES, SAG_PIPELINES, STOCK_PIPELINES


@dataclass(frozen=True)
class ModelCard:
    """A pipeline's denoiser (and ControlNet) at a published size.

    ``documented_layers`` are those that diffusers' or the model's documentation recommends;
    ``height``, ``width`` (pixels) and ``frames`` are the model's native size. ``variant`` tells
    checkpoints of one pipeline apart. ``config`` may leave out what is the class's default.
    """

    pipeline: str
    checkpoint: str
    denoiser: str
    config: dict[str, Any]
    documented_layers: tuple[str, ...]
    height: int = 1024
    width: int = 1024
    controlnet: dict[str, Any] | None = None
    vae_scale_factor: int = 8
    frames: int = 1
    frame_factor: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        """What the ledger and the command line call it."""
        return f"{self.pipeline}-{self.variant}" if self.variant else self.pipeline

    @property
    def size(self) -> Size:
        return Size(self.height, self.width, self.frames, self.vae_scale_factor, self.frame_factor)

    @property
    def sequential(self) -> bool:
        """Whether the pipeline runs uncond and cond in two calls of the denoiser."""
        return _PIPELINES[self.pipeline].sequential

    @property
    def guidance(self) -> tuple[bool, ...]:
        """With CFG and without, as far as the pipeline has it."""
        return (False,) if _PIPELINES[self.pipeline].passes == "alone" else (True, False)


def _card(denoiser: str, checkpoint: Checkpoint) -> ModelCard:
    return ModelCard(
        checkpoint.pipeline,
        checkpoint.name,
        denoiser,
        checkpoint.config,
        _PIPELINES[checkpoint.pipeline].layers,
        checkpoint.height,
        checkpoint.width,
        checkpoint.controlnet,
        checkpoint.vae_scale_factor,
        checkpoint.frames,
        checkpoint.frame_factor,
        checkpoint.variant,
    )


_PIPELINES = {entry.name: entry for entry in PIPELINES}
_CARDS = [_card(entry.name, made) for entry in DESCRIPTIONS for made in entry.checkpoints]
_CARDS.sort(key=lambda card: _PIPELINES[card.pipeline].kind != "pag")
CARDS: dict[str, ModelCard] = {card.name: card for card in _CARDS}

# pipelines whose denoiser is that of a card, at its size
_ALIKE = {card.pipeline.replace("PAG", ""): card for card in _CARDS if not card.variant}


def find_card(pipeline: str) -> ModelCard:
    """The model card of a pipeline.

    Pipelines without PAG, and those that begin with a picture, have the denoiser of another one.

    Raises:
        ValueError: no such pipeline.
    """
    if pipeline in CARDS:
        return CARDS[pipeline]
    if pipeline in STOCK_PIPELINES:
        raise ValueError(
            f"{pipeline} gets PAG on layers that are named, and the published size of its model is "
            "not known here: give layer_costs a pipeline that is loaded."
        )
    if pipeline in SAG_PIPELINES:
        raise ValueError(f"{pipeline} has no layers to choose: it gets no PAG.")
    if pipeline not in HOSTS:
        near = difflib.get_close_matches(pipeline, known_names(), 3)
        hint = f": did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"Unknown pipeline {pipeline!r}{hint} `pag-fast layers` lists those that are known."
        )
    related = (HOSTS[pipeline].base or pipeline).replace("Alpha", "Sigma")
    if related not in _ALIKE:
        related = related.replace("Img2Img", "").replace("Inpaint", "")
    return replace(_ALIKE[related], pipeline=pipeline, documented_layers=HOSTS[pipeline].layers)


def known_names() -> list[str]:
    """What :func:`find_card` knows, each name once: pipelines with PAG first."""
    return list(dict.fromkeys([*PAG_PIPELINES, *HOSTS, *CARDS]))


def meta_model(
    card: ModelCard, which: str = "denoiser", dtype: torch.dtype = torch.float16
) -> nn.Module:
    """The ``"denoiser"`` or ``"controlnet"`` of a card on the meta device.

    Raises:
        ValueError: a ControlNet of a card that has none.
    """
    import diffusers

    config = card.config if which == "denoiser" else card.controlnet
    if config is None:
        raise ValueError(f"{card.pipeline} has no ControlNet.")
    name = card.denoiser if which == "denoiser" else "ControlNetModel"
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config).eval()
    _make_countable(model)
    # the base method: diffusers' own warns about casting, and nothing here is ever computed
    return nn.Module.to(model, dtype)


def _make_countable(model: nn.Module) -> None:
    found = find(model)
    if found is not None and found.countable is not None:
        found.countable(model)


def meta_twin(model: Any) -> nn.Module:
    """A model of the same configuration on the meta device."""
    config = dict(model.config)
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        config.update(encoder_hid_dim_type=None, encoder_hid_dim=None)
    with torch.device("meta"):
        twin = type(model).from_config(config).eval()
    _make_countable(twin)
    if is_derived(model):
        keep_traced(twin, describe(model))
    return nn.Module.to(twin, torch.float16)
