"""Timing variants in turns: whatever slows the machine for a while slows all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .record import EQUAL, Row, Spread

Call = Callable[[], object]
Clock = Callable[[Call, str], float]


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(call: Call, device: str) -> float:
    """Wall-clock time of one call, to the end of its work on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def turns(names: Sequence[str]) -> Iterator[list[str]]:
    """``names`` without end, each time beginning with the next one."""
    while True:
        yield list(names)
        names = [*names[1:], *names[:1]]


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    device: str = "cpu",
    *,
    warmup: int = 1,
    clock: Clock = seconds,
) -> dict[str, list[float]]:
    """Seconds of every call in every round; a round runs each call once, in rotating order.

    Args:
        warmup: rounds before, not timed.
        clock: measures one call on ``device``.

    Raises:
        ValueError: nothing to call, or fewer than one round.
    """
    if not calls or rounds < 1 or warmup < 0:
        raise ValueError(
            "Timing needs at least one call, one round and no negative warm-up; got "
            f"{len(calls)} calls, {rounds} rounds, {warmup} for warm-up."
        )
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = turns(list(calls))
    for index in range(warmup + rounds):
        for name in next(order):
            took = clock(calls[name], device)
            if index >= warmup:
                samples[name].append(took)
    return samples


def peak_bytes(call: Call, device: str) -> int | None:
    """Most GPU memory allocated while ``call`` runs, weights included; ``None`` on a CPU."""
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated()


def make_rows(
    samples: Mapping[str, Sequence[float]],
    *,
    suite: str,
    case: str,
    settings: dict[str, Any],
    dtype: str,
    peaks: Mapping[str, int | None] | None = None,
    psnrs: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row per variant from its seconds in every round.

    Ratios are taken within each round, so that drift from round to round cancels.

    Raises:
        ValueError: the variants ran different numbers of rounds.
    """
    counts = {name: len(values) for name, values in samples.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"Ratios need all variants in every round; got rounds {counts}.")
    rows = []
    for name, own in samples.items():
        ratios = {
            other: Spread.of([b / a for a, b in zip(own, values, strict=True)])
            for other, values in samples.items()
            if other != name
        }
        found = (psnrs or {}).get(name)
        equal = found is not None and math.isinf(found)
        rows.append(
            Row(
                suite,
                case,
                name,
                dict(settings),
                dtype,
                len(own),
                Spread.of(own),
                ratios,
                (peaks or {}).get(name),
                None if equal else found,
                EQUAL if equal else "",
                list(own),
            )
        )
    return rows
