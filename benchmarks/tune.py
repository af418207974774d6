"""Measure which backend and which tile is fastest on this GPU: ``python -m benchmarks.tune``.

Writes ``<chip>.json`` for ``pag_fast_kernels/configs``, which ``backend="auto"`` and the launchers
read. The file is written anew after every case: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from pag_fast_kernels.launch import CONFIGS, Config, architecture, call_key, chip_name, generation
from tqdm.auto import tqdm

from benchmarks.queued import QueuedClock
from benchmarks.tiles import (
    CANDIDATES,
    DTYPES,
    SAMPLES,
    SPECIALISED,
    Ahead,
    Case,
    all_cases,
    launch,
    runs,
)
from pag_fast import ops

Measure = Callable[[Callable[[], object]], float]


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """q, k and v as :func:`pag_fast.ops.perturbed_attention` takes them."""
    shape = (case.rows, case.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    return [q, k, v] if case.context else [q[: case.attend], k[: case.attend], v]


def tune_case(
    case: Case, dtype: torch.dtype, device: str, candidates: Sequence[Config], measure: Measure
) -> dict[str, Any]:
    """The fastest tile, and the faster of it and PyTorch: an entry of the table.

    A tile that the chip refuses, or that computes something else than PyTorch, is no candidate.
    """
    q, k, v = inputs(case, dtype, device)
    mix = {"num_attend": case.attend, "num_context": case.context}
    by_torch: dict[str, Any] = {**mix, "backend": "torch"}
    expected = ops.perturbed_attention(q, k, v, num_forked=case.forked, **by_torch)
    if case.forked:
        seconds = {"torch": measure(
            lambda: ops.perturbed_attention(q, k, v, num_forked=case.forked, **by_torch)
        )}  # fmt: skip
    else:
        scratch = v.clone()
        seconds = {"torch": measure(lambda: ops.perturbed_attention_(q, k, scratch, **by_torch))}
    out = torch.empty_like(expected)
    best: Config | None = None
    for config in candidates:
        if not runs(case, config, (q, k, v, out)):
            continue
        run = functools.partial(launch, case, config, q, k, v, out)
        try:
            run()
        except triton.runtime.errors.OutOfResources:
            continue
        if not torch.allclose(out, expected, atol=2e-2, rtol=2e-2):
            continue
        took = measure(run)
        if took < seconds.get("triton", float("inf")):
            seconds["triton"], best = took, config
    if best is None:
        raise RuntimeError(f"No tile runs {case} in {dtype}.")
    names = ("dtype", "head_dim", "tokens", "attend_per_perturbed", "joint")
    key = call_key(dtype, case.head_dim, case.tokens, case.rows, case.attend, case.context)
    return {
        **dict(zip(names, key, strict=True)),
        "backend": min(seconds, key=lambda name: seconds[name]),
        "config": list(asdict(best).values()),
        "microseconds": {name: round(1e6 * value, 1) for name, value in seconds.items()},
        "model": case.model,
    }


def tune(
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    device: str,
    candidates: Sequence[Config],
    measure: Measure,
    until: float = float("inf"),
    ready: Callable[[Case, torch.dtype], object] = lambda case, dtype: None,
) -> Iterator[list[dict[str, Any]]]:
    """The table so far, after every case; two cases of one key: the one with more tokens counts.

    ``ready`` waits until the kernels of a case are compiled.
    """
    found: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for case in cases:
        for dtype in dtypes:
            if time.monotonic() > until:
                return
            key = call_key(dtype, case.head_dim, case.tokens, case.rows, case.attend, case.context)
            if key in found and found[key][0] >= case.tokens:
                continue
            ready(case, dtype)
            if time.monotonic() > until:
                return
            found[key] = case.tokens, tune_case(case, dtype, device, candidates, measure)
            yield [entry for _, entry in found.values()]


def write_table(
    path: Path,
    entries: Sequence[dict[str, Any]],
    device_name: str,
    architecture: tuple[str, int],
) -> None:
    """A file that ``pag_fast_kernels.launch.read_table`` reads, one line an entry."""
    head: dict[str, Any] = {"chip": device_name}
    head |= zip(("architecture", "processors"), architecture, strict=True)
    head |= {"torch": torch.__version__, "triton": triton.__version__}
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = json.dumps(head)[:-1] + ',\n "attention": [\n' + lines + "\n ]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def on_gpu(clock: QueuedClock) -> Measure:
    """Median seconds on the GPU, with the L2 cache cleared between runs."""
    return lambda run: statistics.median(clock(run) for _ in range(SAMPLES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CONFIGS, help="folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that compile ahead",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU")
    name = torch.cuda.get_device_name()
    path = arguments.out / f"{chip_name(name)}.json"
    cases = [case for case in all_cases() if arguments.model in case.model]
    until = time.monotonic() + arguments.seconds
    tiles = CANDIDATES + (SPECIALISED if generation("cuda", None) == "wgmma" else [])
    ahead = Ahead(cases, DTYPES, tiles, arguments.workers, until)
    clock = on_gpu(QueuedClock())
    steps = tune(cases, DTYPES, "cuda", tiles, clock, until, ahead.ready)
    try:
        for entries in tqdm(steps, total=len(cases) * len(DTYPES), unit="case"):
            write_table(path, entries, name, architecture(None))
            print(json.dumps(entries[-1]), flush=True)
    finally:
        ahead.stop()
    print(path)


if __name__ == "__main__":
    main()
