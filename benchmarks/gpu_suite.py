"""Runs stages on a GPU: ``python -m benchmarks.gpu_suite --out FOLDER step``; see gpu_suite.sh.

A stage leaves ``STAGE.json``, a results file (``pag_fast/tools/bench/record.py``) that also says
how each part ended; logs of all stages go to one archive. Both are written anew after every part: a
run that is cut short leaves what it has. A part is a run of its own, so that ``rows`` are those of
parts that passed, and what others measured is kept apart as ``other_rows``, for no comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stages import STAGE_SECONDS, STAGES, Part

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pag_fast", "kernels", "benchmarks", "tests")
NEEDED = ("torch", "triton", "diffusers", "transformers", "pytest", "pytest_benchmark")
LARGEST_LOG, LARGEST_ARCHIVE = 2**20, 15 * 2**20
LEAST = 20.0  # nothing can be measured in less


# ---- what runs here ----


def probe() -> dict[str, Any]:
    """In a process of its own: the machine, and what is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {"machine": {}, "missing": missing}
    import torch

    from pag_fast.tools.bench.record import machine

    if not torch.cuda.is_available():
        return {"machine": machine("cpu"), "missing": ["a GPU that torch can use"]}
    found = machine("cuda")
    if found["commit"] is None and os.environ.get("COMMIT"):
        found["commit"] = os.environ["COMMIT"]
    return {"machine": found, "missing": []}


def probe_here() -> dict[str, Any]:
    """:func:`probe`, which imports torch, beside this process, which needs none."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", "--probe"],
        cwd=ROOT, stdout=subprocess.PIPE, timeout=240, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tree_id(folder: Path) -> str:
    """What ``git rev-parse COMMIT:FOLDER`` says of this content, without git.

    A checkout without ``.git`` is told by it. Bytecode does not count.
    """
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        if path.is_dir():
            entries.append((path.name + "/", "40000", path.name, tree_id(path)))
            continue
        data = path.read_bytes()
        mode = "100755" if os.access(path, os.X_OK) else "100644"
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entries.append((path.name, mode, path.name, blob))
    lines = [
        f"{mode} {name}".encode() + b"\0" + bytes.fromhex(digest)
        for _, mode, name, digest in sorted(entries)
    ]
    content = b"".join(lines)
    return hashlib.sha1(b"tree %d\0" % len(content) + content).hexdigest()


# ---- one part ----


@contextlib.contextmanager
def _group(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts; none of them is left behind."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_part(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Run it for at most ``limit`` seconds; logs and results go to ``folder``."""
    slug = part.name.replace(",", "").replace(" ", "-")
    rows, log = folder / f"{slug}.rows.json", folder / f"{slug}.log"
    cores = os.cpu_count() or 1
    jobs = int(os.environ.get("JOBS", min(8, cores)))
    parallel = jobs > 1 and importlib.util.find_spec("xdist") is not None
    words = {
        "{rows}": [str(rows)],
        "{seconds}": [f"{max(1.0, limit - part.last):.0f}"],
        "{workers}": [str(os.environ.get("JOBS", max(1, cores - 2)))],
        "{jobs}": ["-n", str(jobs)] if parallel else [],
    }
    command = [
        word.replace("{folder}", str(folder))
        for given in part.command
        for word in words.get(given, [given])
    ]
    start = time.monotonic()
    with _group(command, log) as process:
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "name": part.name,
        "status": {None: "out of time", 0: "passed"}.get(code, "failed"),
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
        "command": " ".join(command[1:]),
        "tail": lines[-1:] if code == 0 else lines[-15:],
        "rows": json.loads(rows.read_text(encoding="utf-8"))["rows"] if rows.exists() else [],
    }


# ---- a stage ----


def run_stage(name: str, found: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Run its parts; the report is written to ``out`` after each."""
    start = time.monotonic()
    report: dict[str, Any] = {
        "schema": 1,
        "stage": name,
        "machine": found["machine"],
        "sources": {source: tree_id(ROOT / source) for source in SOURCES},
        "tests": "not run",
        "parts": [],
        "rows": [],
        "other_rows": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for part in STAGES[name]:
        left = STAGE_SECONDS - (time.monotonic() - start)
        entry: dict[str, Any] = {"name": part.name, "seconds": 0.0}
        if found["missing"]:
            missing = ", ".join(found["missing"])
            entry |= {"status": "not started", "reason": f"Missing here: {missing}."}
        elif left < LEAST:
            entry |= {"status": "not started", "reason": "The time of the stage is over."}
        else:
            print(f"== {name}: {part.name}, at most {min(left, part.seconds):.0f} s", flush=True)
            entry = run_part(part, min(left, part.seconds), folder)
        measured = entry.pop("rows", [])
        report["rows" if entry["status"] == "passed" else "other_rows"] += measured
        report["parts"].append(entry)
        report["tests"] = _verdict(report)
        report["seconds"] = round(time.monotonic() - start, 1)
        _tables(report, folder)
        write(out / f"{name}.json", json.dumps(report, indent=1).encode() + b"\n")
        print("\n".join(_lines(entry)), flush=True)
    return report


def _verdict(report: dict[str, Any]) -> str:
    statuses = {entry["status"] for entry in report["parts"]}
    if report["rows"]:
        return "passed"
    return "failed" if "failed" in statuses else "passed" if statuses == {"passed"} else "not run"


def _tables(report: dict[str, Any], folder: Path) -> None:
    """What was tuned, as ``pag_fast_kernels/configs`` takes it."""
    for path in sorted(folder.glob("configs/*.json")):
        report["table"] = {path.stem: json.loads(path.read_text(encoding="utf-8"))}


def _lines(entry: dict[str, Any]) -> list[str]:
    head = f"{entry['name']}: {entry['status']}, {entry['seconds']} s"
    return [head, *(f"   {line}" for line in entry.get("tail", [entry.get("reason", "")]))]


# ---- what a run leaves ----


def write(path: Path, data: bytes) -> None:
    """All of it or nothing: a run can end at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def archive(folder: Path) -> bytes:
    """Everything in ``folder``: the ends of what is long, and no more than fits."""
    paths = sorted(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p)
    )
    buffer, total = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in paths:
            data = path.read_bytes()[-LARGEST_LOG:]
            total += len(data)
            if total > LARGEST_ARCHIVE:
                break
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size, info.mtime = len(data), int(path.stat().st_mtime)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def run(names: Sequence[str], out: Path) -> int:
    """All these stages; 0 if nothing failed, was cut short or not begun."""
    out.mkdir(parents=True, exist_ok=True)
    bundle = out / ("-".join(names if len(names) < len(STAGES) else ["all"]) + ".tar.gz")
    found = probe_here()
    statuses = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in names:
                report = run_stage(name, found, Path(scratch) / name, out)
                statuses += [entry["status"] for entry in report["parts"]]
        finally:
            write(bundle, archive(Path(scratch)))
    print(f"{', '.join(sorted(path.name for path in out.iterdir()))} in {out.name}")
    return 0 if set(statuses) <= {"passed"} else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", help="folder")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join([*STAGES, "all"]))
    arguments = parser.parse_args(argv)
    if arguments.probe:
        print(json.dumps(probe()))
        return 0
    names = list(dict.fromkeys(arguments.stages))
    unknown = set(names) - {*STAGES, "all"}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(STAGES)}, all")
    # whoever stops this stops its parts, and the files are written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(list(STAGES) if "all" in names or not names else names, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
