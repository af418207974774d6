"""Where the perturbed pass leaves the main pass in a transformer, and how it resumes there.

Most transformers of ComfyUI ask ``patches_replace["dit"]`` before each of their blocks. In the
main pass a patch on the last block in front of the fork keeps what that block returns; in the
perturbed pass the blocks up to there return what they were given, and that one returns what was
kept. The transformer's own forward runs unchanged around them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..blocks import Block, dit_lists
from .inputs import Door, alike, rows_of, tensors_of
from .others import Memory, ours
from .record import Entry

Patch = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
Key = tuple[str, int]

# transformers in which a perturbed pass that resumes was compared with a whole one (tests)
COMPARED = frozenset(
    {"Flux", "Chroma", "OpenAISignatureMMDITWrapper", "WanModel", "QwenImageTransformer2DModel",
     "HunyuanVideo", "LTXVModel"}
)  # fmt: skip

# transformers that have run without asking patches for their blocks, and those that have asked
HOOKLESS: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
ASKING: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def key_of(block: Block) -> Key:
    """The key under which ComfyUI looks for a patch of ``block``."""
    return f"{block[0]}_block", block[1]


class DiTPlan:
    """What a transformer keeps of its main pass, and hands out in the perturbed one.

    Args:
        blocks: the perturbed blocks.
    """

    def __init__(self, blocks: frozenset[Block]) -> None:
        self.blocks = blocks
        self._order: weakref.WeakKeyDictionary[Any, list[Key]] = weakref.WeakKeyDictionary()
        # what was seen to differ when it resumed
        self.refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.trusted: weakref.WeakSet[Any] = weakref.WeakSet()

    def supports(self, net: torch.nn.Module) -> str | None:
        """Nothing is shared in front of the first block, or where sharing was seen to fail."""
        if net in HOOKLESS:
            return "its blocks ask no patches"
        if net in self.refused:
            return self.refused[net]
        if not self.shared(net):
            return "its first block is perturbed, so that nothing lies in front of it"
        return None

    def doubted(self, net: torch.nn.Module) -> bool:
        """Whether a resumed pass has to be compared with a whole one before it is trusted."""
        return type(net).__name__ not in COMPARED and net not in self.trusted

    def shared(self, net: torch.nn.Module) -> list[Key]:
        """The blocks in front of the first perturbed one, in running order."""
        if net not in self._order:
            self._order[net] = [
                key_of((kind, number, None))
                for kind, blocks in dit_lists(net).items()
                for number in range(len(blocks))
            ]
        order = self._order[net]
        return order[: min(order.index(key_of(block)) for block in self.blocks)]

    def behind(self, net: torch.nn.Module, kind: str, where: Any) -> bool:
        """Whether a patch acts at or behind the fork alone; those of all blocks do not."""
        order = self._order.get(net, [])
        return kind == "dit" and where in order and order.index(where) >= len(self.shared(net))

    # -- the main pass ----------------------------------------------------------------------

    def record(
        self, net: torch.nn.Module, entries: list[tuple[Entry, slice]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with a patch that keeps the entries' rows of the last shared block."""
        first, *_, last = [self.shared(net)[0], *self.shared(net)]
        memory = Memory(options, lambda kind, where: self.behind(net, kind, where))
        doubted = any(entry.doubted for entry, _ in entries)

        @ours
        def begin(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            for entry, rows in entries:
                if entry.kept:
                    entry.spoiled = "its main pass runs the model several times"
                if doubted:
                    entry.door = rows_of(_given(args), rows, _batch(args), clone=True)
            if doubted:
                memory.begin()
            return _run(args, extra, before)

        @ours
        def keep(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            out = _run(args, extra, before)
            changed = doubted and memory.changed()
            for entry, rows in entries:
                entry.remembers = entry.remembers or changed
                # blocks behind this one write into their input
                entry.kept[last] = {
                    name: tensor[rows].clone()
                    for name, tensor in out.items()
                    if isinstance(tensor, torch.Tensor)
                }
            return out

        return with_patches(with_patches(options, {last: keep}), {first: begin})

    def complete(self, net: torch.nn.Module, entry: Entry) -> bool:
        """Whether the last shared block was run, and asked our patch."""
        return self.shared(net)[-1] in entry.kept

    # -- the perturbed pass -----------------------------------------------------------------

    def resume(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with patches that hand out what was kept up to the last shared block."""
        first, *skipped = self.shared(net)
        last, door = [first, *skipped][-1], Door(entries)

        @ours
        def begin(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            door.enter(_given(args), _batch(args))
            return skip(args, extra, before) if skipped else hand_out(args, extra, before)

        @ours
        def skip(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            return _run(args, extra, before) if door.whole else args

        @ours
        def hand_out(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            if door.whole:
                return _run(args, extra, before)
            kept = [entry.kept.pop(last) for entry in entries]
            joined = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
            return {**args, **joined}

        patches: dict[Key, Any] = {**dict.fromkeys(skipped, skip), last: hand_out, first: begin}
        return with_patches(options, patches)

    def check(
        self, net: torch.nn.Module, entries: list[Entry], options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options`` with a patch that compares what the last shared block returns."""
        last = self.shared(net)[-1]

        @ours
        def compare(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
            out = _run(args, extra, before)
            for i, entry in enumerate(entries):
                kept = entry.kept.pop(last, None)
                again = kept is not None and all(
                    alike(tensor, out[name].chunk(len(entries))[i]) for name, tensor in kept.items()
                )
                entry.alike = entry.alike is not False and again
            return out

        return with_patches(options, {last: compare})


def _run(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
    return before(args, extra) if before else extra["original_block"](args)


def _given(args: dict[str, Any]) -> dict[str, Any]:
    """What a block computes with; the others are options, and how ComfyUI calls it."""
    return {name: args[name] for name in args if name != "transformer_options"}


def _batch(args: dict[str, Any]) -> int:
    """The rows of a batch, by the first tensor that a block is given."""
    return next(tensor.shape[0] for _, tensor in tensors_of(_given(args)))


@ours
def leave_out(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> dict[str, Any]:
    """A block that returns what it was given."""
    return args


def with_patches(options: dict[str, Any], patches: dict[Key, Any]) -> dict[str, Any]:
    """``options`` with patches in front of blocks; each gets the patch that was there before."""
    replaced = dict(options.get("patches_replace", {}))
    dit = replaced["dit"] = dict(replaced.get("dit", {}))
    for key, patch in patches.items():
        dit[key] = _chained(patch, dit.get(key))
    return {**options, "patches_replace": replaced}


def _chained(patch: Any, before: Patch | None) -> Patch:
    def chained(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return patch(args, extra, before)

    # another node's patch that ours calls is still one to be wary of
    chained.pag_fast = getattr(patch, "pag_fast", False) and (  # type: ignore[attr-defined]
        before is None or getattr(before, "pag_fast", False)
    )
    return chained
