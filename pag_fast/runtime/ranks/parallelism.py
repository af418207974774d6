"""Which tokens, or which heads, of a forward are on this rank, where several share a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models.registry import family_of
from ...sharing.rows import BranchState
from ..compatibility.findings import Findings
from ..compatibility.hooks import CONTEXT_PARALLEL


def share(
    state: BranchState,
    model: Any,
    attentions: Mapping[str, Any],
    call: dict[str, Any],
    found: Findings,
) -> None:
    """Write down what of a forward is on this rank, for everything on the model.

    Args:
        model: on which :mod:`pag_fast.runtime.compatibility` has found context or tensor
            parallelism, and refused neither.
        attentions: its perturbed layers.
        call: the arguments of its forward by name, as they are in front of all hooks.
        found: what is on the model.

    Raises:
        ValueError: context parallelism that the model does not know of, padded prompts in a ring,
            or heads that ranks cannot share equally, or that are not cut alike.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None and any(item.what == CONTEXT_PARALLEL for item in found.items):
        raise ValueError(
            "Hooks or processors of context parallelism are on a model that was not told of it: "
            "use enable_parallelism(config=ContextParallelConfig(...))."
        )
    if config is None:
        state.head_rank = _share_of_heads(attentions)
        return
    from .token_ranks import TokenRanks

    family = family_of(model)
    assert family.cut is not None
    if config.ring_degree > 1 and any(map(_hides, call.items())):
        raise ValueError(
            "Padded prompts are masked, and diffusers' ring attention gives the keys of every "
            "rank the mask of one: use ulysses_degree, or prompts without padding."
        )
    texts, image = family.cut(model, call)
    state.ranks = ranks = TokenRanks(config, image, texts[0])
    state.head_rank = ranks.rank
    for name, attention in attentions.items():
        if attention.heads % ranks.world:
            raise ValueError(
                f"{name} has {attention.heads} heads, which {ranks.world} ranks cannot share "
                "equally: cut sequences for a number of ranks that divides them."
            )
    if family.sequence is not None:
        state.num_contexts, state.num_image = (ranks.own_text,), ranks.own_image


def _hides(argument: tuple[str, Any]) -> bool:
    """Whether an argument is a mask that hides some text."""
    name, value = argument
    return name.endswith("_mask") and value is not None and not bool(value.all())


_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def _share_of_heads(attentions: Mapping[str, Any]) -> int:
    """Which share of the heads of perturbed layers tensor parallelism has left here.

    Raises:
        ValueError: projections that are not cut alike, into whole heads.
    """
    ranks = set()
    for name, attention in attentions.items():
        parts = (getattr(attention, part, None) for part in _PROJECTIONS)
        cuts = {_cut(part) for part in parts if part is not None}
        if len(cuts) > 1 or any(attention.heads % world for _, world in cuts):
            raise ValueError(
                f"The projections of {name} are not cut alike into whole heads: use diffusers' own "
                "tensor parallelism, enable_parallelism(config=TensorParallelConfig(...))."
            )
        ranks |= {rank for rank, _ in cuts}
    if len(ranks) > 1:
        raise ValueError("Perturbed layers are cut over meshes of their own: cut all over one.")
    return ranks.pop() if ranks else 0


def _cut(projection: Any) -> tuple[int, int]:
    """Which share of a projection's heads is here, and of how many."""
    weight = projection.weight
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return 0, 1
    if mesh.ndim > 1:
        raise ValueError(
            "Tensor parallelism and FSDP on one mesh are not known to be exact with perturbed "
            "attention: use one of them."
        )
    return (mesh.get_local_rank(), mesh.size()) if weight.placements[0].is_shard(0) else (0, 1)
