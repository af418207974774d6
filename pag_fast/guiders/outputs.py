"""Which of a module's arguments stand for what it returns, where it is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.registry import find
from ..sharing.plan import argument_names

Given = Mapping[str, torch.Tensor]
"""The tensors that a module is called with, by the names of its arguments."""

_CONTEXT = "encoder_hidden_states"


class Outputs(NamedTuple):
    """What a module returns.

    Attributes:
        arguments: names of the arguments that stand for its outputs, in order.
        form: makes what it returns of several; ``None``: it returns one tensor by itself.
    """

    arguments: tuple[str, ...]
    form: Callable[[list[torch.Tensor]], Any] | None

    def of(self, tensors: list[torch.Tensor]) -> Any:
        """What takes the place of its outputs."""
        return tensors[0] if self.form is None else self.form(tensors)


def given(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """The tensors among the arguments of a call, in the order of the module's arguments."""
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    call = {name: call[name] for name in [*names, *kwargs] if name in call}
    return {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}


def described(model: nn.Module, block: nn.Module) -> tuple[str, ...] | None:
    """What a block of a described model returns; ``None`` for models and blocks that are not."""
    family = find(model)
    if family is None or family.is_derived:
        return None
    names = argument_names(block)
    # a model may wrap its blocks (HiDream-I1)
    for module in (block, *block.children()):
        kinds = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in family.blocks]
        if kinds:
            streams = tuple(stream.argument for stream in family.blocks[kinds[0]])
            return streams if set(streams) <= set(names) else None
    return None


def by_diffusers(block: nn.Module) -> tuple[str, ...]:
    """What diffusers says of a block's class; for some it says that too few are returned."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    for cls in type(block).__mro__:
        try:
            found = TransformerBlockRegistry.get(cls)
        except ValueError:
            continue
        hidden = getattr(found, "hidden_states_argument_name", None) or "hidden_states"
        context = getattr(found, "encoder_hidden_states_argument_name", None) or _CONTEXT
        order: dict[int | None, str] = {
            found.return_hidden_states_index: hidden,
            found.return_encoder_hidden_states_index: context,
        }
        order.pop(None, None)
        return tuple(order[index] for index in sorted(order))  # type: ignore[type-var]
    return ()


def streams_of(attention: nn.Module) -> tuple[str, ...]:
    """The streams of an attention, in the order in which all of diffusers' return them."""
    names = argument_names(attention)
    hidden = "hidden_states" if "hidden_states" in names else names[0]
    return hidden, *[name for name in names if name.endswith(_CONTEXT)][:1]


def seen(module: nn.Module, out: Any, call: Given, likely: tuple[str, ...]) -> Outputs:
    """What a module returns, by what it has returned for ``call``.

    Args:
        likely: an order that decides between arguments of one shape.

    Raises:
        ValueError: none of its arguments has the shape of an output, or several have.
    """
    form = None if isinstance(out, torch.Tensor) else type(out)
    tensors = [out] if form is None else list(out) if form in (tuple, list) else []
    fitting = [
        [name for name, x in call.items() if isinstance(y, torch.Tensor) and x.shape == y.shape]
        for y in tensors
    ]
    names = argument_names(module)
    if not tensors or not all(fitting):
        raise _refusal(module, "it returns what none of its arguments can stand for")
    if len(likely) == len(tensors) and all(map(_holds, fitting, likely)):
        return Outputs(likely, form)
    if len(tensors) == 1 and names[0] in fitting[0]:
        return Outputs((names[0],), form)
    chosen = tuple(found[0] for found in fitting)
    if any(len(found) > 1 for found in fitting) or len(set(chosen)) < len(chosen):
        raise _refusal(
            module,
            "several of its arguments have the shape of what it returns, and which stands for "
            "that cannot be told. A prompt of another length may tell them apart",
        )
    return Outputs(chosen, form)


def _holds(found: list[str], name: str) -> bool:
    return name in found


def _refusal(module: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"A {type(module).__name__} cannot be skipped: {why}. Skip other layers, or the scores of "
        "its attention (skip_attention_scores=True)."
    )
