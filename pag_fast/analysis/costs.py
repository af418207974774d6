"""What PAG costs on each layer of a model, so that layers can be chosen by cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..config import PatchConfig
from ..models.inputs import Inputs, Size
from ..models.layer_names import resolve, self_attentions
from ..models.registry import denoiser_name, family_of, uncompiled
from ..patching import applied_layers, check_pipeline
from ..pipelines.description import PipelineDescription
from ..pipelines.registry import (
    HOSTS,
    describe_pipeline,
    described_with,
    has_layers,
    host_of,
)
from ..settings.checks import switch
from ..settings.layers import as_list
from .flops import patched_flops
from .lower_bound import Bound, Traced, row_flops, trace
from .published import find_card, meta_model, meta_twin


@dataclass(frozen=True)
class LayerCost:
    """PAG on one layer alone, in steps of the same pipeline without PAG.

    Attributes:
        over_cfg: the least that a step can cost; a patched pipeline is within 1 % of it.
        unshared_over_cfg: as diffusers' PAG pipelines do it: one branch more, of three or of two.
        default: whether the layer is one of those that are perturbed unless others are chosen.
    """

    name: str
    over_cfg: float
    unshared_over_cfg: float
    default: bool


@dataclass(frozen=True)
class LayerCosts:
    """The answer of :func:`layer_costs`, in execution order; ``str()`` is the table.

    Attributes:
        cfg: whether the steps have classifier-free guidance.
        source: where the choice of the default layers comes from, or ``""``.
        default_over_cfg: what a step of the patched pipeline costs with the default layers
            together, counted rather than bounded; ``None`` if the model has none of them.
    """

    title: str
    size: Size
    cfg: bool
    layers: tuple[LayerCost, ...]
    source: str
    default_over_cfg: float | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, every: bool = False) -> str:
        """Lines of text: one for each layer, or for each transformer that holds some."""
        from .explanation import table

        unit = "with CFG" if self.cfg else "without CFG"
        rows = []
        for group in [[x] for x in self.layers] if every else _groups(self.layers):
            costs = list(dict.fromkeys(f"{x.over_cfg:.3f}" for x in group))
            cost = costs[0] if len(costs) == 1 else f"{costs[0]} to {costs[-1]}"
            mark = "default" if any(x.default for x in group) else ""
            rows.append((_label(group), f"{cost}×", f"{group[0].unshared_over_cfg:.3f}×", mark))
        lines = [
            f"{self.title}, {self.size}",
            f"a step with PAG on one layer alone, in steps {unit} and without PAG;",
            "what is least: a patched pipeline is within 1 % of it\n",
            *table(("layer", "branches shared", "unshared", ""), rows),
        ]
        if self.default_over_cfg is not None:
            together = f"{self.default_over_cfg:.3f}×"
            lines += ["", f"with the default layers together, as patched: {together}"]
        if self.source:
            lines.append(f"default: {self.source}")
        return "\n".join(lines)


def _has_uncond(title: str, host: PipelineDescription | None) -> bool:
    """Whether CFG has a branch besides cond.

    Raises:
        ValueError: it has two.
    """
    if host is None or len(host.others) == 1:
        return True
    if host.others:
        raise ValueError(
            f"{title} has guidance with two scales, whose branches are not counted here: ask for "
            "cfg=False."
        )
    return False


def _host_with_layers(pipe: Any) -> tuple[PipelineDescription | None, tuple[str | int, ...]]:
    """The description of a pipeline without PAG as it would be with layers, and its layers.

    Raises:
        ValueError: a pipeline that cannot be patched, or has no layers to choose.
    """
    check_pipeline(pipe)
    found = describe_pipeline(pipe)
    if found.kind == "stock":  # it gets PAG on the layers that are named, and has none of its own
        return described_with(pipe, perturbs=True), ()
    if not has_layers(pipe):
        raise ValueError(f"{type(pipe).__name__} has no layers to choose: it gets no PAG.")
    return host_of(pipe), tuple(as_list(applied_layers(pipe)))


def layer_costs(
    pipe: Any,
    *,
    cfg: bool = True,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> LayerCosts:
    """What a step with PAG costs on every layer that can be perturbed, each alone.

    Counted in FLOPs of the denoiser from its configuration, on the meta device: weights are not
    needed, and nothing is run.

    Args:
        pipe: a pipeline that :func:`pag_fast.patch` takes, patched or not, or the name of one: a
            class such as ``"FluxPipeline"`` at its published size.
        cfg: with classifier-free guidance.
        height: in pixels; omitted, the pipeline's default.
        width: likewise.
        frames: of a video, likewise.

    Raises:
        ValueError: a pipeline that cannot be patched, or a name that is not known.
    """
    switch("cfg", cfg)
    config = PatchConfig()
    if isinstance(pipe, str):
        card = find_card(pipe)
        size = card.size.but(height, width, frames)
        host = HOSTS.get(card.pipeline)
        layers: tuple[str | int, ...] = card.documented_layers
        title, model = f"{card.name}, {card.checkpoint}", meta_model(card)
    else:
        host, layers = _host_with_layers(pipe)
        if hasattr(pipe, "_pag_fast"):
            config = pipe._pag_fast.config
        size = Size.of(pipe).but(height, width, frames)
        denoiser = uncompiled(getattr(pipe, denoiser_name(pipe)))
        title, model = type(pipe).__name__, meta_twin(denoiser)
    try:
        chosen = tuple(resolve(model, layers, exact=config.exact_layers))
    except ValueError:  # a small model has not the layers that are named for the published one
        chosen = ()
    inputs = size.inputs(model)
    try:
        traced = trace(model, inputs)
    except RuntimeError as error:
        raise ValueError(f"{title} does not run at {size}: {error}") from error
    sequential = host is not None and host.sequential
    cfg = cfg and _has_uncond(title, host)
    row, both = row_flops(traced), cfg and not sequential
    # uncond in a call of its own costs the same with PAG as without
    alone = row if cfg and sequential else 0
    without = row * (2 if cfg else 1)
    least = _least(model, inputs, traced, both, config)
    place = {item.name: index for index, item in enumerate(traced)}
    costs = [
        LayerCost(
            name,
            (least(name) + alone) / without,
            1.5 if cfg else 2.0,
            name in chosen,
        )
        for name in sorted(self_attentions(model), key=lambda name: place.get(name, 0))
    ]
    together = None
    if chosen:
        counted = patched_flops(model, list(layers), inputs, cfg=both, config=config)
        together = (counted + alone) / without
    source = host.source if host is not None and layers == host.layers and chosen else ""
    return LayerCosts(title, size, cfg, tuple(costs), source, together)


def _least(
    model: Any, inputs: Inputs, traced: Sequence[Traced], cfg: bool, config: PatchConfig
) -> Callable[[str], int]:
    """FLOPs of a step with PAG on one layer: the least; of derived models what runs."""
    bound = Bound(model, inputs, cfg=cfg)

    def least(name: str) -> int:
        if family_of(model).is_derived:  # nobody knows what has to
            return patched_flops(model, [f"^{re.escape(name)}$"], inputs, cfg=cfg, config=config)
        return bound.total(traced, (name,))

    return least


_IN_TRANSFORMER = re.compile(
    r"(.*\.(?:attentions|motion_modules)\.\d+\.transformer_blocks)\.(\d+)\.(.*)"
)


def _groups(layers: Sequence[LayerCost]) -> Iterator[list[LayerCost]]:
    """Neighbours in one transformer of a UNet, which differ little."""

    def transformer(layer: LayerCost) -> str:
        match = _IN_TRANSFORMER.fullmatch(layer.name)
        return layer.name if match is None else match[1]

    for _, group in groupby(layers, transformer):
        yield list(group)


def _label(group: Sequence[LayerCost]) -> str:
    matches = [match for x in group if (match := _IN_TRANSFORMER.fullmatch(x.name))]
    if len(group) == 1 or not matches:
        return group[0].name
    blocks = list(dict.fromkeys(match[2] for match in matches))
    kinds = ",".join(dict.fromkeys(match[3] for match in matches))
    span = blocks[0] if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
    return f"{matches[0][1]}.{span}.{kinds}"
