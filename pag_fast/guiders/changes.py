"""What is perturbed in a forward: attentions, feed-forwards, or whole blocks."""

from __future__ import annotations

from typing import Any

import torch
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
        returns: names of the arguments that take the place of its outputs, in order.
    """

    def __init__(self, state: BranchState, module: nn.Module, returns: tuple[str, ...]) -> None:
        super().__init__(state, module)
        self.returns = returns
        self._names = argument_names(module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.slabs is None:  # somebody has kept it from a perturbed forward
            return self._base(*args, **kwargs)
        found: list[torch.Tensor | None] = []
        for name in self.returns:
            if name in kwargs:
                found.append(kwargs[name])
            elif name in self._names[: len(args)]:
                found.append(args[self._names.index(name)])
            else:
                found.append(None)
        if self.state.ranks is not None:  # the module's own hook would cut them
            cut, ranks = cut_arguments(self.module), self.state.ranks
            pairs = zip(self.returns, found, strict=True)
            found = [ranks.part(x) if x is not None and name in cut else x for name, x in pairs]
        return found[0] if len(found) == 1 else tuple(found)


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


def skipped_block(state: BranchState, block: nn.Module) -> Skipped:
    """A transformer block that leaves its streams alone, in the order in which it returns them."""
    hidden, context = "hidden_states", "encoder_hidden_states"
    order: dict[int | None, str] = {0: hidden}
    metadata = _metadata(block)
    if metadata is not None:
        hidden = getattr(metadata, "hidden_states_argument_name", None) or hidden
        context = getattr(metadata, "encoder_hidden_states_argument_name", None) or context
        order = {
            metadata.return_hidden_states_index: hidden,
            metadata.return_encoder_hidden_states_index: context,
        }
        order.pop(None, None)
    names = argument_names(block)
    if metadata is None and hidden not in names:
        hidden = names[0]
        order = {0: hidden}
    return Skipped(state, block, tuple(order[index] for index in sorted(order)))  # type: ignore[type-var]


def skipped_attention(state: BranchState, attention: nn.Module) -> Skipped:
    """An attention that returns its input; joint attention returns that of both streams."""
    joint = any(getattr(attention, name, None) is not None for name in ("add_q_proj", "add_k_proj"))
    context = ("encoder_hidden_states",) if joint else ()
    return Skipped(state, attention, ("hidden_states", *context))


def skipped_feed_forward(state: BranchState, module: nn.Module) -> Skipped:
    """A feed-forward that returns its input."""
    return Skipped(state, module, (argument_names(module)[0],))


def _metadata(block: nn.Module) -> Any:
    """What diffusers knows about the outputs of a block's class; ``None`` for others."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    for cls in type(block).__mro__:
        try:
            return TransformerBlockRegistry.get(cls)
        except ValueError:
            continue
    return None
