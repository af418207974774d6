"""Which attentions project queries, keys and values of one tensor, and take views of one product.

Every processor that a model's description names as fusable calls ``to_q``, ``to_k`` and ``to_v`` in
this order on the very same tensor (``add_q_proj``, ``add_k_proj`` and ``add_v_proj`` likewise, on
the text) wherever its attention is one over a single stream, and goes on with ``view``,
``unflatten`` or ``reshape`` of the last dimension. Diffusers' own fused projections hand on views
with the same strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# attentions that do not say whether they are over a second sequence: the names of those that aren't
_SELF_ATTENTIONS: dict[str, tuple[str, ...]] = {"FluxAttention": (), "LTXAttention": ("attn1",)}
# modules that do linear(act(temb)), and nothing else with the activation and two dimensions
_TIME = {
    "AdaLayerNormContinuous": ("silu", "linear"),
    "AdaLayerNormShift": ("silu", "linear"),
    "AdaLayerNormZero": ("silu", "linear"),
    "ResnetBlock2D": ("nonlinearity", "time_emb_proj"),
    "SD35AdaLayerNormZeroX": ("silu", "linear"),
}


def is_fusable(attention: nn.Module, known: frozenset[str]) -> bool:
    """Whether an attention's own processor takes projections that are views of one tensor.

    ``known`` names those of diffusers that do.
    """
    from ..processors.rows import PerturbedProcessor

    if getattr(attention, "fused_projections", False):
        return False  # diffusers has done it: its processor calls to_qkv
    processor = getattr(attention, "processor", None)
    cls = type(processor)
    stock = cls.__name__ in known and cls.__module__.startswith("diffusers.")
    return stock or isinstance(processor, PerturbedProcessor)


def attention_projections(
    name: str, module: Any, together: int
) -> Iterator[tuple[tuple[str, ...], list[nn.Linear]]]:
    """Names and layers of the projections of one attention that see the same tensor."""
    parts = module._modules
    if parts.get("to_q") is None or not _is_self_attention(name, module):
        return
    has_text = all(parts.get(part) is not None for part in TEXT)
    # image-only perturbed attention projects V on more rows, and into its output
    count = 3 if has_text else together
    for names in (IMAGE[:count], TEXT) if has_text else (IMAGE[:count],):
        layers = [parts.get(part) for part in names]
        if count > 1 and all(type(layer) is nn.Linear for layer in layers):
            yield names, layers


def _is_self_attention(name: str, module: nn.Module) -> bool:
    for cls in type(module).__mro__:
        if cls.__name__ in _SELF_ATTENTIONS:
            names = _SELF_ATTENTIONS[cls.__name__]
            return not names or name.rpartition(".")[2] in names
    return vars(module).get("is_cross_attention", True) is False


def time_projection(module: nn.Module) -> tuple[str, str] | None:
    """Names of the activation and the linear layer that project the time embedding, if any."""
    cls = type(module)
    names = _TIME.get(cls.__name__)
    if names is None or not cls.__module__.startswith("diffusers."):
        return None
    if getattr(module, "skip_time_act", False):
        return None
    activation, linear = (module._modules.get(name) for name in names)
    return names if type(activation) is nn.SiLU and type(linear) is nn.Linear else None
