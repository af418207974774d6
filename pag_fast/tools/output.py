"""What the commands leave: JSON that every reader takes, and one line in a log instead of a bar."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def to_json(data: Any, indent: int | None = 2) -> str:
    """``data`` as strict JSON: what is no finite number becomes ``null``, as JSON has no word."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Write :func:`to_json` to a file."""
    path.write_text(to_json(data, indent), encoding="utf-8")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def files_first(report: object) -> Iterator[None]:
    """Print a report behind its files, which are written inside: each is there without the other.

    A terminal may lack its characters, and a file its folder.
    """
    try:
        yield
    finally:
        print(report)


@contextmanager
def progress(total: int, unit: str, *, name: str = "", show: bool = True) -> Iterator[Any]:
    """tqdm's bar on a terminal and in a notebook; elsewhere one line when all is done."""
    from tqdm import auto, std

    drawn = sys.stderr.isatty() or auto.notebook_tqdm is not std.tqdm
    start = time.perf_counter()
    with auto.tqdm(total=total, unit=unit, desc=name or None, disable=not (show and drawn)) as bar:
        yield bar
    if show and not drawn:
        seconds = time.perf_counter() - start
        head = f"{name}: " if name else ""
        print(f"{head}{total} {unit}{'s'[: total != 1]} in {seconds:.1f} s", file=sys.stderr)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Neither diffusers nor transformers draws bars where standard error is no terminal."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    drawn = [] if sys.stderr.isatty() else [diffusers, transformers]
    drawn = [logging for logging in drawn if logging.is_progress_bar_enabled()]
    for logging in drawn:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in drawn:
            logging.enable_progress_bar()


def without_matplotlib() -> str:
    """How to get matplotlib where it is missing, as a sentence; else nothing."""
    if sys.modules.get("matplotlib", "") is None or importlib.util.find_spec("matplotlib") is None:
        return "Pictures need matplotlib, which is not installed: pip install 'pag-fast[bench]'."
    return ""
