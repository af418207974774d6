"""Faults of branches on ranks: who runs what, whether ranks agree, uncond ahead of its time."""

from __future__ import annotations

from planting import Fault

_PLACEMENT, _RANKS = "pag_fast/parallel/placement.py", "pag_fast/parallel/ranks.py"
_AGREEMENT = "pag_fast/parallel/agreement.py"
_ON_RANKS, _AHEAD = "pag_fast/runtime/ranks/on_ranks.py", "pag_fast/runtime/ranks/ahead.py"


def _tests(file: str, select: str) -> tuple[str, ...]:
    return f"tests/distributed/test_{file}.py", "-k", select


RANKS = [
    Fault(
        "a rank gets the residuals of another one",
        _PLACEMENT,
        "return x[start * unit : (stop + 1) * unit]",
        "return x[: (stop - start + 1) * unit]",
        _tests("ranks", "pag_pipelines and 2"),
    ),
    Fault(
        "ranks do not compare their latents",
        _RANKS,
        "of_step = [latents, *(",
        "of_step = [*(",
        _tests("ranks_agree", "differ_raise"),
    ),
    Fault(
        "ranks compare nothing behind the first step",
        _RANKS,
        "differs = (notes != notes[0]).any(0)",
        "differs = torch.zeros(4, dtype=torch.bool)",
        _tests("ranks_agree", "callback_sets_apart"),
    ),
    Fault(
        "ranks do not compare what the last step leaves",
        _RANKS,
        "refuse(torch.stack([ended, latents, kind & latents]), _DRAWN)",
        "pass",
        _tests("ranks_agree", "behind_the_last"),
    ),
    Fault(
        "ranks do not compare their guidance scales",
        _RANKS,
        "code(scales)",
        "0",
        _tests("ranks_agree", "last_combination"),
    ),
    Fault(
        "ranks do not compare their settings when a call begins",
        _AGREEMENT,
        "refuse((found != found[0]).any(0), names)",
        "pass",
        _tests("ranks_agree", "last_combination"),
    ),
    Fault(
        "a layer's heads are told from rows that a rank has none of",
        "pag_fast/processors/rows.py",
        "heads, x.shape[2] // heads)",
        "heads, -1)",
        _tests("ranks", "every_perturbation and 3"),
    ),
    Fault(
        "uncond ahead has cond's kept conditioning",
        _ON_RANKS,
        "state.context = UNCOND",
        "pass",
        _tests("ranks", "other_pipelines and 2"),
    ),
    Fault(
        "what ran ahead is handed out for another prompt",
        _AHEAD,
        "return _alike(x, source[name])",
        "return True",
        _tests("ranks", "negative_prompt"),
    ),
]
