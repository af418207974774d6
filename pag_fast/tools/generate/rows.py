"""The rows of a prompt file: what is to be drawn, and under which name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...settings import checks

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_LONGEST = 255 - len(".png")
_SCALES = frozenset({"pag_scale", "guidance_scale"})
# what this command sets itself, for all rows
_SET = frozenset({"generator", "num_images_per_prompt", "output_type", "return_dict", "latents"})


@dataclass(frozen=True)
class Row:
    """One picture.

    Args:
        name: of its file, without ending.
        seed: of its generator: the picture depends on no other row.
        prompt: what is drawn.
        negative_prompt: what is avoided, if the row says so.
        call: further arguments of the pipeline's call; rows with equal ones share a batch.
    """

    name: str
    seed: int
    prompt: str
    negative_prompt: str | None = None
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Tells this row from another of the same name."""
        content = [self.seed, self.prompt, self.negative_prompt, self.call]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(file: Path, seed: int) -> list[Row]:
    """The rows of a file of JSON lines.

    Args:
        file: lines ``{"prompt": ..., "id": ..., "seed": ..., "negative_prompt": ..., ...}``. Only
            the prompt is needed: ``id`` is the number of the line, ``seed`` is ``seed`` plus that
            number. Other keys are arguments of the pipeline's call.
        seed: of the first line.

    Raises:
        ValueError: a line that is no such object, a name that cannot be a file's, or two alike.
    """
    rows: list[Row] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}): save it as such.") from error
    for number, line in enumerate(lines):
        if line.strip():
            rows.append(_row(file, number, line, seed))
    if not rows:
        raise ValueError(f"{file} has no rows: write one JSON object with a prompt on each line.")
    seen: dict[str, Row] = {}
    for row in rows:
        # names that differ in case are one file on some systems
        if seen.setdefault(row.name.lower(), row) is not row:
            raise ValueError(f"{file} has two rows with the id {row.name!r}: give each its own.")
    return rows


def _row(file: Path, number: int, line: str, seed: int) -> Row:
    where = f"{file}, line {number + 1}"
    try:
        content = json.loads(line, parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): write {{'prompt': '...'}}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}.')
    given = content.pop("id", f"{number:06d}")
    name = str(given) if isinstance(given, int | str) and not isinstance(given, bool) else ""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        said = repr(given) if isinstance(given, str) else json.dumps(given)
        raise ValueError(
            f"{where}: id {said} cannot be the name of a file: use at most {_LONGEST} letters, "
            "digits, '_', '-' and '.'."
        )
    own = content.pop("seed", seed + number)
    if not isinstance(own, int) or isinstance(own, bool) or not 0 <= own < 2**63:
        raise ValueError(f"{where}: seed {own!r} is no whole number from 0 to 2**63 - 1.")
    negative = content.pop("negative_prompt", None)
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f"{where}: negative_prompt {negative!r} is no text.")
    for scale in _SCALES & content.keys():
        checks.number(f"{where}: {scale}", content[scale], least=0.0)
    refused = sorted(_SET & content.keys())
    if refused:
        raise ValueError(f"{where}: {refused[0]} is set for all rows: leave it out.")
    return Row(name, own, content.pop("prompt"), negative, content)


def _no_number(text: str) -> float:
    """Raises ValueError: Python reads NaN and infinity, JSON has neither."""
    raise ValueError(f"{text} is no number in JSON")


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in their order, up to ``size`` of equal arguments at a time."""
    waiting: list[Row] = []
    for row in rows:
        alike = waiting and _arguments(row) == _arguments(waiting[0])
        if waiting and (len(waiting) == size or not alike):
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def _arguments(row: Row) -> tuple[Any, bool]:
    return row.call, row.negative_prompt is None
