"""The answer of :func:`pag_fast.explain`: data, and the text it prints as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..models.inputs import Size
from .flops import Cost
from .ranks import RankCost, slowest

PIPELINES_SCALE = "the call's pag_scale and pag_adaptive_scale"


@dataclass(frozen=True)
class ModelCall:
    """Rows, in units of one branch, that a model call runs on."""

    model: str
    cfg: bool
    stock: int
    patched: str


@dataclass(frozen=True)
class Predicted:
    """FLOPs of a step for one image."""

    cfg: bool
    stock: int
    patched: int
    bound: int


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: attributes are the data, ``str()`` is the table.

    Attributes:
        layers: perturbed attention modules, or blocks, in execution order; empty for Self-Attention
            Guidance, which perturbs none.
        fork: the first of them, where the perturbed branch begins.
        perturbations: each perturbed branch: what sets it apart, where, and how strongly it guides.
        tree: where uncond, cond and perturbed part, or what the passes of a step are, in words.
        sites: modules whose rows are changed, with the levels they go through.
        calls: what each model call runs on.
        flops: predicted FLOPs of a step, stock, patched and lower bound; empty where unknown.
        schedule: the PAG scale from step to step, in words; empty where there is none.
        size, frames: ``(height, width)`` in pixels, and of a video the frames, the prediction is
            for.
        steps: denoiser calls so far, by how they ran.
        fallbacks: reasons why something ran unshared, and how often.
        once: modules that run once per call, as they see nothing but the conditioning.
        launches: what is left out of every step without changing its result, by model.
        source: where a choice of layers that nobody made comes from: a paper, an issue, or none.
        findings: what others have put on the models, and what comes of it.
        ranks: what each rank runs in a step, where there are several.
    """

    pipeline: str
    denoiser: str
    is_patched: bool
    backend: str
    layers: tuple[str, ...]
    fork: str | None
    tree: tuple[str, ...]
    sites: tuple[str, ...]
    calls: tuple[ModelCall, ...]
    flops: tuple[Predicted, ...]
    size: tuple[int, int]
    schedule: str = PIPELINES_SCALE
    steps: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    launches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    perturbations: tuple[str, ...] = ()
    frames: int = 1
    source: str = ""
    findings: tuple[str, ...] = ()
    ranks: tuple[RankCost, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts and numbers, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        state = (
            f"patched, backend {self.backend}" if self.is_patched else "not patched; if it were:"
        )
        lines = [f"{self.pipeline} · {self.denoiser} · {state}", ""]
        source = f", by default: {self.source}" if self.source else ""
        if self.layers:
            lines += [f"perturbed layers ({len(self.layers)}){source}", *_shorten(self.layers), ""]
            lines += ["perturbation", *[f"  {line}" for line in self.perturbations], ""]
        title = "branch tree" if self.layers else "passes of a step"
        lines += [title, *[f"  {line}" for line in self.tree], ""]
        rows = [(c.model, "on" if c.cfg else "off", str(c.stock), c.patched) for c in self.calls]
        lines += table(("model call", "CFG", "branches stock", "branches patched"), rows)
        if self.schedule:
            lines += ["", f"PAG scale: {self.schedule}"]
        if self.flops:
            costs = flops_of(self)
            unit, size = flops_unit(costs), Size(*self.size, self.frames)
            lines += ["", f"{unit} per step, one sample of {size}", *flops_table(costs, "CFG")]
        lines += self._rank_lines()
        lines += self._runtime_lines()
        return "\n".join(lines)

    def _rank_lines(self) -> list[str]:
        """The branches of each rank, and how much sooner a step of the slowest ends."""
        if not self.ranks:
            return []
        # flops are not known before the pipeline's models have been counted
        unit = flops_unit(flops_of(self)) if self.flops else "TFLOPs"
        size = flops_size(unit)
        rows = [
            (
                str(cost.rank),
                "on" if cost.cfg else "off",
                " ".join(cost.branches) or "none",
                "–" if cost.flops is None else f"{cost.flops / size:.3f}",
            )
            for cost in self.ranks
        ]
        lines = ["", "branches on ranks", *table(("rank", "CFG", "branches", unit), rows)]
        for whole in self.flops:
            least = slowest([cost for cost in self.ranks if cost.cfg == whole.cfg])
            guidance = "on" if whole.cfg else "off"
            lines.append(
                f"CFG {guidance}: {least / size:.3f} {unit} on the slowest rank, one process over "
                f"it {whole.patched / least:.2f}×"
            )
        return lines

    def _runtime_lines(self) -> list[str]:
        """What is kept or left out, what has run so far, and what others have put on the model."""
        lines: list[str] = []
        if self.once:
            lines += ["", f"once per call: {_summary(self.once)}"]
        if self.launches:
            lines += ["", "fewer launches", *[f"  {line}" for line in self.launches]]
        if self.steps:
            lines += ["", "steps so far: " + ", ".join(f"{k} {v}" for k, v in self.steps.items())]
        for reason, times in self.fallbacks.items():
            lines.append(f"fallback ×{times}: {reason}")
        if self.findings:
            lines += ["", "others on the model", *[f"  {line}" for line in self.findings]]
        lines += [f"note: {note}" for note in self.notes]
        return lines


def _summary(names: Sequence[str]) -> str:
    pairs = [name for name in names if name.endswith((".to_k", ".to_v", ".to_kv"))]
    others = [name for name in names if name not in pairs]
    return ", ".join([*others, f"{len(pairs)} keys and values of text"] if pairs else others)


def _shorten(names: Sequence[str]) -> list[str]:
    if len(names) > 8:
        names = [*names[:4], f"… {len(names) - 6} more", *names[-2:]]
    return [f"  {name}" for name in names]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [line(header), rule, *map(line, rows)]


def flops_of(explanation: Explanation) -> list[tuple[str, Cost]]:
    """The predicted costs, with CFG on and off."""
    return [
        ("on" if p.cfg else "off", Cost(p.stock, p.patched, p.bound)) for p in explanation.flops
    ]


_UNITS = {"TFLOPs": 10**12, "GFLOPs": 10**9, "MFLOPs": 10**6}


def flops_unit(costs: Sequence[tuple[str, Cost]]) -> str:
    """The largest unit in which the cheapest of ``costs`` is not all zeros: at least 0.1 of it."""
    least = min(cost.stock for _, cost in costs)
    return next((unit for unit, size in _UNITS.items() if least >= size / 10), "MFLOPs")


def flops_size(unit: str) -> int:
    """FLOPs in one of ``unit``."""
    return _UNITS[unit]


def flops_table(costs: Sequence[tuple[str, Cost]], first: str) -> list[str]:
    """The FLOP columns that ``explain`` and the ledger share, in :func:`flops_unit`."""
    size = flops_size(flops_unit(costs))
    return table(
        (first, "stock", "patched", "lower bound", "stock/patched", "over bound"),
        [
            (
                label,
                f"{cost.stock / size:.3f}",
                f"{cost.patched / size:.3f}",
                f"{cost.bound / size:.3f}" if cost.bound else "–",
                f"{cost.speedup:.3f}×",
                f"{100 * (cost.patched / cost.bound - 1):.2f} %" if cost.bound else "–",
            )
            for label, cost in costs
        ],
    )
