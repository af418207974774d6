"""The gate: has anything become slower? ``python -m benchmarks.compare OLD.json NEW.json``.

Two results files are compared by the ratios within each of them, patched against every baseline of
the same case and the same rounds; times of different runs never meet. A ratio whose median fell by
more than the threshold is a regression. Two files of counts (``benchmarks/counts.json``) or of
compiled kernels (``benchmarks/aot.json``) are compared number by number, without a threshold.

Exit status: 0, nothing is worse; 1, something is, or is missing; 2, the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pag_fast.analysis.explanation import table
from pag_fast.tools.bench.record import Results, Spread, read, read_json

COUNTED = ("flops", "launches", "bytes")  # of a step
RESOURCES = ("reg", "stack", "local", "shared")  # of a binary; instructions are no cost

Ratios = dict[str, Spread]


def ratios(results: Results) -> Ratios:
    """Speed of every patched variant against every baseline of its case, by what it is called."""
    return {
        f"{row.suite}: {row.case}, {row.dtype}, {row.variant} / {other}": spread
        for row in results.rows
        if row.variant.startswith("patched")
        for other, spread in row.ratios.items()
        if not other.startswith("patched")
    }


def counts(report: dict[str, Any]) -> dict[str, int]:
    """Every number of a file of counts that should not rise."""
    if "binaries" in report:
        return {
            f"{name}, {resource}": found[resource]
            for name, found in report["binaries"].items()
            for resource in RESOURCES
            if resource in found
        }
    absent = [kind for kind in COUNTED if kind not in report]
    if absent:
        raise ValueError(f"A file of counts lacks {', '.join(absent)}: make it with this version.")
    return {
        f"{kind}: {name}": entry["patched"]
        for kind in COUNTED
        for name, entry in report[kind].items()
    }


def refusals(old: Results, new: Results, names: tuple[str, str], any_chip: bool) -> Iterator[str]:
    """Sentences that say why two results files prove nothing about each other."""
    for name, results in zip(names, (old, new), strict=True):
        if results.tests != "passed":
            yield (
                f"The tests of {name} are {results.tests!r}: a result counts only with passing "
                "tests, measure it again when they pass."
            )
    chips = old.machine.get("chip"), new.machine.get("chip")
    if chips[0] != chips[1] and not any_chip:
        yield (
            f"{names[0]} is of {chips[0]!r} and {names[1]} of {chips[1]!r}: ratios differ between "
            "chips, --any-chip compares them all the same."
        )
    if not ratios(old).keys() & ratios(new).keys():
        yield f"{names[0]} and {names[1]} have no case in common: measure the same suite in both."


def compare_results(old: Results, new: Results, threshold: float) -> tuple[list[str], bool]:
    """Lines of a report, and whether nothing is worse: every ratio of ``old`` found in ``new``."""
    before, after = ratios(old), ratios(new)
    rows, worse, better = [], [], []
    for name in [name for name in before if name in after]:
        change = after[name].median / before[name].median - 1
        rows.append((name, _spread(before[name]), _spread(after[name]), f"{100 * change:+.1f} %"))
        # not (>=): a ratio that is no number has not held
        if not change >= -threshold:
            worse.append(f"{name}: {_spread(before[name])} became {_spread(after[name])}")
        elif change > threshold:
            better.append(f"{name}: {_spread(before[name])} became {_spread(after[name])}")
    lines = table(("patched / baseline, × as fast", "old (p20 to p80)", "new", "change"), rows)
    lines += _differences(old.machine, new.machine)
    return _verdict(lines, worse, better, list(before.keys() - after.keys()), f"{threshold:.1%}")


def compare_counts(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """As :func:`compare_results` for counts: a single one more is a regression."""
    before, after = counts(old), counts(new)
    worse, better = [], []
    for name in [name for name in before if name in after]:
        line = f"{name}: {before[name]} became {after[name]}, {after[name] - before[name]:+}"
        if after[name] > before[name]:
            worse.append(line)
        elif after[name] < before[name]:
            better.append(line)
    lines = [f"{len(before.keys() & after.keys())} counts"]
    lines += _differences(old.get("versions", {}), new.get("versions", {}))
    return _verdict(lines, worse, better, list(before.keys() - after.keys()), "0")


def _verdict(
    lines: list[str], worse: list[str], better: list[str], missing: list[str], threshold: str
) -> tuple[list[str], bool]:
    lines += ["", *(f"improved: {line}" for line in better)]
    lines += [f"REGRESSION: {line}" for line in worse]
    lines += [
        f"MISSING: {name} is in the old file alone: measure it too, or leave it out of both."
        for name in sorted(missing)
    ]
    lines.append(
        f"{len(worse)} worse, {len(better)} better, {len(missing)} missing; threshold {threshold}"
    )
    return lines, not worse and not missing


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.p20:.3f} to {spread.p80:.3f})"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Notes on what else changed between the files: versions, threads, the chip."""
    ignored = ("date", "commit", "dirty", "pag_fast", "clocks")
    return [
        f"note: {key} was {old.get(key)}, is {new.get(key)}"
        for key in old.keys() | new.keys()
        if key not in ignored and old.get(key) != new.get(key)
    ]


def fraction(text: str) -> float:
    """``"5%"`` or ``"0.05"`` as a number from 0 to 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no threshold: give a part of 1, such as 5% or 0.05"
        )
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=fraction, default=0.05, help="5%% if omitted")
    parser.add_argument("--any-chip", action="store_true", help="compare different chips too")
    arguments = parser.parse_args(argv)
    paths = arguments.old, arguments.new
    try:
        kinds = [_kind(path) for path in paths]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{paths[0].name} holds {kinds[0]} and {paths[1].name} holds {kinds[1]}: give two "
                "files of one kind."
            )
        if kinds[0] == "results":
            old, new = (read(path) for path in paths)
            names = (paths[0].name, paths[1].name)
            why = list(refusals(old, new, names, arguments.any_chip))
            if why:
                raise ValueError(" ".join(why))
            lines, fine = compare_results(old, new, arguments.threshold)
        else:
            lines, fine = compare_counts(*(read_json(path) for path in paths))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if fine else 1


def _kind(path: Path) -> str:
    report = read_json(path)
    for key, kind in (("rows", "results"), ("flops", "counts"), ("binaries", "binaries")):
        if key in report:
            return kind
    raise ValueError(f"{path.name} holds neither results nor counts: give a file of a benchmark.")


if __name__ == "__main__":
    sys.exit(main())
