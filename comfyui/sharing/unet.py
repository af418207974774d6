"""Where the perturbed pass leaves the main pass in a UNet, and how it resumes there.

A UNet of ComfyUI runs its layers through ``forward_timestep_embed``, which asks the patches in
``forward_timestep_embed_patch`` first. One patch for every class of layer sees all of them: in the
main pass it runs the layer and keeps what is needed behind the fork, in the perturbed pass it
hands that out in front of the fork and runs the layer from there on. The UNet's own forward runs
unchanged, so ControlNets, FreeU, Kohya's deep shrink and every other patch act as they do without.

The fork is the layer (a ``SpatialTransformer``) with the first perturbed attention. Behind it the
perturbed pass needs the layer's input and those outputs of the way down that the rest of the way
up concatenates.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules import openaimodel

from ..blocks import Block
from ..perturbations import Identity
from .inputs import Door, alike, rows_of
from .others import Memory, ours
from .record import Entry

PATCH = "forward_timestep_embed_patch"
Place = tuple[str, int, int]  # ("input", "middle" or "output", block, layer of the block)
Layer = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of one UNet in the order in which they run.

    Args:
        places: the place of each layer, by ``id``.
        order: the index of each place.
        last: places whose output leaves their block.
        fork: the first place that the perturbed pass computes.
        keep: places in front of the fork whose output is needed behind it.
    """

    places: dict[int, Place]
    order: dict[Place, int]
    last: frozenset[Place]
    fork: Place
    keep: frozenset[Place]

    def shared(self, place: Place) -> bool:
        """Whether the perturbed pass takes this layer from the main pass."""
        return self.order[place] < self.order[self.fork]

    def ends(self, place: Place) -> bool:
        """Whether this is the last layer in front of the fork."""
        return self.order[place] == self.order[self.fork] - 1


def _sequences(net: Any) -> list[tuple[str, int, Any]]:
    middle = [] if net.middle_block is None else [("middle", 0, net.middle_block)]
    return [
        *(("input", i, block) for i, block in enumerate(net.input_blocks)),
        *middle,
        *(("output", i, block) for i, block in enumerate(net.output_blocks)),
    ]


def layers_of(net: Any, blocks: frozenset[Block]) -> Layers:
    """The layers of ``net`` (a ``UNetModel``) and the fork of a pass perturbed in ``blocks``."""
    places: dict[int, Place] = {}
    order: dict[Place, int] = {}
    last: set[Place] = set()
    perturbed = {(kind, number) for kind, number, _ in blocks}
    fork: Place | None = None
    for kind, number, sequence in _sequences(net):
        for j, layer in enumerate(sequence):
            place = (kind, number, j)
            places[id(layer)] = place
            order[place] = len(order)
            attends = isinstance(layer, SpatialTransformer)
            if fork is None and attends and (kind, number) in perturbed:
                fork = place
        last.add(place)
    assert fork is not None, "blocks are checked when the node is executed"
    return Layers(places, order, frozenset(last), fork, _needed(net, order, last, fork))


def _needed(net: Any, order: dict[Place, int], last: set[Place], fork: Place) -> frozenset[Place]:
    kind, number, layer = fork
    downs = len(net.input_blocks)
    # block j of the way up concatenates the output of block downs - 1 - j of the way down
    first_up = 0 if kind != "output" else number + (1 if layer else 0)
    needed = {
        place
        for place in last
        if place[0] == "input" and order[place] < order[fork] and downs - 1 - place[1] >= first_up
    }
    before = [place for place in order if order[place] == order[fork] - 1]
    return frozenset(needed.union(before))


class UNetPlan:
    """What a UNet keeps of its main pass, and hands out in the perturbed one.

    Args:
        blocks: the perturbed blocks.
    """

    def __init__(self, blocks: frozenset[Block]) -> None:
        self.blocks = blocks
        self._layers: weakref.WeakKeyDictionary[Any, Layers] = weakref.WeakKeyDictionary()

    def supports(self, net: torch.nn.Module) -> str | None:
        """Only ComfyUI's own UNet runs its layers through patches."""
        if not isinstance(net, openaimodel.UNetModel):
            return f"{type(net).__name__} is no UNet of ComfyUI"
        return None

    def layers(self, net: Any) -> Layers:
        """The layers of ``net``, described once."""
        if net not in self._layers:
            self._layers[net] = layers_of(net, self.blocks)
        return self._layers[net]

    def behind(self, net: torch.nn.Module, kind: str, where: Any) -> bool:
        """Whether a patch acts at or behind the fork alone."""
        layers = self.layers(net)
        if where is not None:
            place = (*where[:2], 0)
            return (
                place in layers.order and layers.order[place] >= layers.order[(*layers.fork[:2], 0)]
            )
        return kind in ("middle_block_after_patch", "output_block_patch") and (
            layers.fork[0] != "output"
        )

    def memory(self, net: torch.nn.Module, options: dict[str, Any]) -> Memory:
        """What other nodes' patches in front of the fork hold."""
        return Memory(options, lambda kind, where: self.behind(net, kind, where))

    # -- the main pass ----------------------------------------------------------------------

    def record(
        self, net: torch.nn.Module, entries: list[tuple[Entry, slice]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with a patch that keeps the entries' rows of what is needed."""
        layers, memory = self.layers(net), self.memory(net, options)
        doubted = any(entry.doubted for entry, _ in entries)

        def keep(layer: torch.nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
            place = layers.places.get(id(layer))
            if place is None or not layers.shared(place):
                return _run(layer, x, *args)
            if not layers.order[place]:
                for entry, rows in entries:
                    if entry.kept:
                        entry.spoiled = "its main pass runs the model several times"
                    if doubted:
                        entry.door = rows_of(_given(x, *args), rows, x.shape[0], clone=True)
                if doubted:
                    memory.begin()
            out = _run(layer, x, *args)
            if doubted and layers.ends(place) and memory.changed():
                for entry, _ in entries:
                    entry.remembers = True
            if place in layers.keep:
                for entry, rows in entries:
                    # what follows may add residuals of a ControlNet in place
                    entry.kept[place] = out[rows].clone()
            elif place in layers.last:
                for entry, rows in entries:
                    entry.kept[place] = out[rows].shape
            return out

        return _with_handler(options, keep)

    def complete(self, net: torch.nn.Module, entry: Entry) -> bool:
        """Whether every needed place was kept."""
        return self.layers(net).keep <= entry.kept.keys()

    # -- the perturbed pass -----------------------------------------------------------------

    def resume(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with a patch that hands out what was kept, and runs the rest."""
        layers, door = self.layers(net), Door(entries)

        def hand_out(layer: torch.nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
            place = layers.places.get(id(layer))
            if place is not None and not layers.order[place]:
                door.enter(_given(x, *args), x.shape[0])
            if place is None or door.whole or not layers.shared(place):
                return _run(layer, x, *args)
            to = args[2]
            if isinstance(layer, SpatialTransformer) and "transformer_index" in to:
                to["transformer_index"] += 1
            if place in layers.keep:
                # each is needed once: what follows may change it in place
                kept = [entry.kept.pop(place) for entry in entries]
                return kept[0] if len(kept) == 1 else torch.cat(kept)
            if place in layers.last:
                # nobody looks at the values, but the shape goes on
                shape = entries[0].kept[place]
                return x.new_zeros((len(entries) * shape[0], *shape[1:]))
            return x

        return _without_queries(_with_handler(options, hand_out))

    def check(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with a patch that compares each needed output with what was kept of it."""
        layers = self.layers(net)

        def compare(layer: torch.nn.Module, *args: Any) -> torch.Tensor:
            out = _run(layer, *args)
            place = layers.places.get(id(layer))
            if place in layers.keep:
                parts = out.chunk(len(entries))
                for entry, part in zip(entries, parts, strict=True):
                    # a second forward of one call was not recorded
                    again = place in entry.kept and alike(entry.kept.pop(place), part)
                    entry.alike = entry.alike is not False and again
            return out

        return _with_handler(options, compare)


def _given(x: torch.Tensor, emb: Any, context: Any, *_: Any) -> dict[str, Any]:
    return {"x": x, "emb": emb, "context": context}


def _with_handler(options: dict[str, Any], handler: Layer) -> dict[str, Any]:
    patches = dict(options.get("patches", {}))
    patches[PATCH] = [(torch.nn.Module, ours(handler)), *patches.get(PATCH, [])]
    return {**options, "patches": patches}


def _run(layer: torch.nn.Module, x: torch.Tensor, emb: Any, context: Any, to: Any, *rest: Any):
    """Run one layer as ComfyUI does without our patch, which comes first in the list."""
    ours = to["patches"]
    theirs = dict(ours)
    theirs[PATCH] = ours[PATCH][1:]
    if not theirs[PATCH]:
        del theirs[PATCH]
    to["patches"] = theirs
    try:
        return openaimodel.forward_timestep_embed((layer,), x, emb, context, to, *rest)
    finally:
        to["patches"] = ours


def _without_queries(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with a patch that empties q and k where our identity drops them.

    ComfyUI projects q, k and v, then calls the replacement. A patch in front of the projections
    hands them no rows, which makes those of q and k free. A replacement for one block of a
    ``SpatialTransformer`` wins over one for the whole, as in ComfyUI.
    """
    replaced = options.get("patches_replace", {}).get("attn1", {})

    def empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]):
        block = extra.get("block")
        if block is not None:
            one = (*block, extra.get("block_index", 0))
            if isinstance(replaced.get(one, replaced.get(block)), Identity):
                return q[:, :0], k[:, :0], v
        return q, k, v

    patches = dict(options.get("patches", {}))
    patches["attn1_patch"] = [*patches.get("attn1_patch", []), empty]
    return {**options, "patches": patches}
