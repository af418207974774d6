"""What is perturbed in a forward: attentions, feed-forwards, or whole blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.registry import family_of
from ..processors.displaced import check_processors
from ..processors.fused_projections import check_fused
from ..processors.rows import PerturbedProcessor
from ..runtime.access.instance_patch import Entry
from ..runtime.compatibility.hooks import cut_arguments
from ..runtime.installation import processor_class
from ..runtime.perturbed_branches import layers_of
from ..runtime.recording import Intercepted
from ..sharing.arguments import latents_of
from ..sharing.plan import argument_names
from ..sharing.rows import SPLIT, BranchState
from ..sharing.tokens import in_runs
from .outputs import Given, Outputs, by_diffusers, described, given, seen, streams_of


class Processed:
    """An attention with another processor."""

    def __init__(self, attention: Any, processor: PerturbedProcessor) -> None:
        self.attention = attention
        self.processor = processor

    def entry(self) -> Entry:
        """The processor, ready for an instance patch."""
        own = self.attention.processor
        found = own.displaced if isinstance(own, PerturbedProcessor) else own
        if found is not self.processor.displaced:
            self.processor.takes_place_of(found)
        return vars(self.attention), "processor", self.processor


class Skipped(Intercepted):
    """A module that returns what it is given.

    Args:
        state: of the model, which says whose forward runs.
        module: the module that does not run.
        returns: names of the arguments that take the place of its outputs, in order; those that a
            call has not are left out. ``None``: it runs once, on what it is to be skipped with, and
            what it returns is looked at.
        likely: an order that decides between arguments of one shape then.
    """

    def __init__(
        self,
        state: BranchState,
        module: nn.Module,
        returns: tuple[str, ...] | None,
        likely: tuple[str, ...] = (),
    ) -> None:
        super().__init__(state, module)
        self.returns = returns
        self._likely = likely
        self._names = argument_names(module)
        # by the arguments that it was called with
        self._seen: dict[tuple[str, ...], Outputs] = {}

    @property
    def is_known(self) -> bool:
        """Whether what it returns was told without running it."""
        return self.returns is not None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.slabs is None:  # somebody has kept it from a perturbed forward
            return self._base(*args, **kwargs)
        call = given(self._names, args, kwargs)
        if self.returns is None:
            outputs = self._looked_at(call, args, kwargs)
        else:
            names = tuple([name for name in self.returns if name in call])
            outputs = Outputs(names, tuple if len(names) > 1 else None)
        found = [call[name] for name in outputs.arguments]
        if self.state.ranks is not None:  # the module's own hook would cut them
            cut, ranks = cut_arguments(self.module), self.state.ranks
            pairs = zip(outputs.arguments, found, strict=True)
            found = [ranks.part(x) if name in cut else x for name, x in pairs]
        return outputs.of(found)

    def _looked_at(self, call: Given, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        key = tuple(call)
        if key not in self._seen:
            out = self.run_original(args, kwargs)
            self._seen[key] = seen(self.module, out, call, self._likely)
        return self._seen[key]


class Perturbed:
    """Attentions of one model that run on the rows of the perturbed branch alone.

    Args:
        state: of the model; a resumption gives it the slabs of the perturbed forward.

    Raises:
        ValueError: an attention whose processor does what ours does not.
    """

    def __init__(
        self,
        state: BranchState,
        model: nn.Module,
        attentions: dict[str, Any],
        backend: str = "auto",
    ) -> None:
        family = family_of(model)
        check_processors(attentions, family.known_processors, strict=not family.runs_stock)
        self._sequence, self._runs = family.sequence, family.tokens
        self._attentions = attentions
        known = layers_of(model, state)
        self.state = state
        self.changes = [
            Processed(
                attention,
                processor_class(family, attention)(state, SPLIT, backend, layer=known[name]),
            )
            for name, attention in attentions.items()
        ]

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the processors which tokens are text, from the arguments of the model.

        Raises:
            ValueError: fused projections that are others than their layers.
        """
        check_fused(self._attentions)
        call = {**dict(zip(argument_names(model), args, strict=False)), **kwargs}
        if self._sequence is not None:
            self.state.num_contexts, self.state.num_image = self._sequence(model, call)
        if self._runs is not None:
            tokens = in_runs(self._runs(model, call), latents_of(call).device)
            self.state.tokens = dict.fromkeys(self._attentions, tokens)


def skipped_block(state: BranchState, model: nn.Module, block: nn.Module) -> Skipped:
    """A transformer block that leaves its streams alone, in the order in which it returns them."""
    return Skipped(state, block, described(model, block), by_diffusers(block))


def skipped_attention(
    state: BranchState, model: nn.Module, block: nn.Module, attention: nn.Module
) -> Skipped:
    """An attention that returns its input; joint attention returns that of both streams.

    Args:
        block: the module that it is a part of.
    """
    known, streams = described(model, block), streams_of(attention)
    # text may be a part of the one stream that a block has, and be handed over all the same
    returns = None if known is None else streams[: len(known)]
    return Skipped(state, attention, returns, streams)


def skipped_feed_forward(state: BranchState, module: nn.Module) -> Skipped:
    """A feed-forward that returns its input."""
    return Skipped(state, module, (argument_names(module)[0],))
