"""Results files: whatever is measured becomes rows of one schema, with the machine it ran on.

A file is JSON: ``{"schema": 1, "machine": {...}, "tests": "passed", "rows": [...]}``.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..output import write_json

SCHEMA = 1
SUITES = ("op", "step", "pipeline", "overhead", "user")
TESTS = ("passed", "failed", "not run")
EQUAL = "equal to stock"
_PACKAGES = ("torch", "triton", "diffusers", "transformers")
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of what was measured round by round."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles by linear interpolation; a single value is its own spread."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), p20, p80)


@dataclass(frozen=True)
class Row:
    """What one variant of one case took.

    Attributes:
        suite: one of ``SUITES``.
        case: what was run, e.g. ``"SDXL 1024 mid"``.
        variant: how, e.g. ``"stock"``, ``"no PAG compiled"``; ours begin with ``"patched"``.
        settings: shapes and arguments, whatever it takes to run it again.
        seconds: of one op, one step or one image.
        ratios: by other variant, its seconds over this one's, of the same rounds: above 1, this one
            is faster.
        peak_bytes: allocated on the GPU at most; ``None`` on a CPU.
        psnr: dB against stock, of pictures with peak 1, or of latents with the range of what the
            call changes in them as peak; ``None`` where nothing was compared, and where ``note``
            says that all is equal.
        samples: seconds of every round, in order.
    """

    suite: str
    case: str
    variant: str
    settings: dict[str, Any]
    dtype: str
    rounds: int
    seconds: Spread
    ratios: dict[str, Spread] = field(default_factory=dict)
    peak_bytes: int | None = None
    psnr: float | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """A results file: rows, the machine, and how the tests went that ran along."""

    machine: dict[str, Any]
    rows: list[Row]
    tests: str = "not run"


def write(results: Results, path: Path) -> None:
    """Write a results file, and the folder it is in."""
    report = {
        "schema": SCHEMA,
        "machine": results.machine,
        "tests": results.tests,
        "rows": [asdict(row) for row in results.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report, 1)


def read(path: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: no such file, not JSON, or not of this schema.
    """
    report = read_json(path)
    schema = report.get("schema")
    if schema != SCHEMA or "rows" not in report:
        raise ValueError(
            f"{path.name} is no results file of schema {SCHEMA} (its schema is {schema!r}): "
            "measure again with this version of pag_fast."
        )
    try:
        rows = [_row(entry) for entry in report["rows"]]
        results = Results(report["machine"], rows, report["tests"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name} lacks what schema {SCHEMA} demands: {error}.") from error
    strange = {row.suite for row in rows} - set(SUITES)
    if strange or results.tests not in TESTS:
        raise ValueError(
            f"{path.name} has suites {sorted(strange)} and tests {results.tests!r}; known are the "
            f"suites {', '.join(SUITES)}, and tests {', '.join(TESTS)}."
        )
    return results


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} could not be read as JSON: {error}.") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path.name} holds a JSON {type(report).__name__}, not an object.")
    return report


def _row(entry: dict[str, Any]) -> Row:
    seconds = _spread(entry["seconds"])
    ratios = {name: _spread(spread) for name, spread in entry["ratios"].items()}
    samples = [_number(value) for value in entry.get("samples", [])]
    return Row(**{**entry, "seconds": seconds, "ratios": ratios, "samples": samples})


def _spread(entry: dict[str, float | None]) -> Spread:
    return Spread(**{name: _number(value) for name, value in entry.items()})


def _number(value: float | None) -> float:
    """As it was measured: what is no finite number is ``null`` in a file."""
    return math.nan if value is None else value


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: chip, driver, threads, versions and the commit."""
    commit, dirty = _commit()
    return {
        "chip": _chip(device),
        "device": device,
        "driver": _smi("driver_version") if device == "cuda" else None,
        "clocks": _smi("clocks.sm,clocks.max.sm") if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "pag_fast": _version("pag-fast"),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _chip(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _smi(what: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0")


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package is in, and whether tracked files differ from it."""
    git = ("git", "-C", str(_PACKAGE))
    top = _output(*git, "rev-parse", "--show-toplevel")
    # an environment in some other checkout is not ours
    if top is None or Path(top) != _PACKAGE.parent:
        return None, None
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return _output(*git, "rev-parse", "HEAD"), bool(changes)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
