"""What pag_fast does about each thing that others have put on a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto


class Answer(Flag):
    """What one thing on a model asks for; answers add up.

    Attributes:
        FINE: nothing changes.
        UNSHARED: every branch runs with rows of its own, in every module.
        KEEP_ROWS: every step runs every row, as outputs are stored by their place in the batch.
        WEIGHTS_APART: no projections are fused, as their weights are read or moved one by one.
        NOTHING_KEPT: no output of one forward is handed out in another one.
        MAY_SKIP: a forward may leave modules out, so perturbed layers need not run in every step.
            One that runs in no step of a call has not been perturbed, and that is still a fault.
        SEES_ROWS: it gets the batch, which holds more rows than the pipeline has given where PAG is
            added to one that has none.
        REFUSE: the call cannot be right.
    """

    FINE = 0
    UNSHARED = auto()
    KEEP_ROWS = auto()
    WEIGHTS_APART = auto()
    NOTHING_KEPT = auto()
    MAY_SKIP = auto()
    RECHECK = auto()
    SEES_ROWS = auto()
    REFUSE = auto()


WEIGHTS = Answer.WEIGHTS_APART | Answer.NOTHING_KEPT
CACHE = Answer.UNSHARED | Answer.KEEP_ROWS | Answer.MAY_SKIP
UNKNOWN = CACHE | WEIGHTS


@dataclass(frozen=True)
class Finding:
    """One kind of thing on a model.

    Attributes:
        what: what was found.
        where: names of the modules that have it; ``""`` where it is about the whole model.
        answer: what pag_fast does about it.
        sentence: the same in words.
    """

    what: str
    where: str
    answer: Answer
    sentence: str


def combined(findings: Iterable[Finding]) -> Answer:
    """All answers together."""
    answer = Answer.FINE
    for finding in findings:
        answer |= finding.answer
    return answer


def refuse(findings: Iterable[Finding]) -> None:
    """Raises ValueError if one of the findings asks for it, with the sentences of all that do."""
    sentences = [f.sentence for f in findings if Answer.REFUSE in f.answer]
    if sentences:
        raise ValueError(" ".join(sentences))


def explain_lines(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The findings as text, those that change the most first."""

    def weight(finding: Finding) -> tuple[int, str]:
        return -finding.answer.value, finding.what

    lines = []
    for finding in sorted(findings, key=weight):
        where = f" ({finding.where})" if finding.where else ""
        lines.append(f"{finding.what}{where}: {finding.sentence}")
    return tuple(lines)
