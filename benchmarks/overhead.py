"""What patching costs in Python: ``python -m benchmarks.overhead [--tree PATH] [--update]``.

Python and C calls (``call`` and ``c_call`` events of ``sys.setprofile``) of one step of a tiny
pipeline, patched minus stock: an integer where a time would depend on the machine. Compares them
with ``benchmarks/overhead.json``, which ``--update`` writes; ``--tree`` counts another checkout
instead of this one, so that both can be printed side by side. ``MOST`` is what commit c28533a
added, which looked at nothing that others put on a model: no version may cost more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "overhead.json"
PIPELINES = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "FluxPipeline",
)
STEPS = (4, 8)
MOST = dict(zip(PIPELINES, (412.0, 363.0, 67.0, 308.0), strict=True))


def events(run: Callable[[], Any]) -> int:
    """How many Python and C functions ``run`` calls."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # a collection calls the weak references' callbacks of whatever was made before
    gc.collect()
    gc.disable()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def per_step(pipe: Any, arguments: Callable[[int], dict[str, Any]]) -> float:
    """Events of one step: the difference of two calls, so that what a call does once is not in."""
    found = []
    for steps in (STEPS[0], *STEPS):  # the first call fills caches
        kwargs = arguments(steps)
        found.append(events(lambda kwargs=kwargs: pipe(**kwargs)))
    return (found[2] - found[1]) / (STEPS[1] - STEPS[0])


def collect(pipelines: Sequence[str] = PIPELINES) -> dict[str, dict[str, float]]:
    """Events per step of each pipeline, stock and patched."""
    import tiny
    import tiny_hosts

    import pag_fast

    found = {}
    for name in pipelines:
        made = tiny if name in tiny.PIPELINES else tiny_hosts
        pipe = made.build(name)

        def arguments(steps: int, made: Any = made, name: str = name, pipe: Any = pipe) -> Any:
            return made.call_kwargs(name, pipe, steps=steps)

        stock = per_step(pipe, arguments)
        layers = None if made is tiny else tiny_hosts.HOSTS[name].layers["middle"]
        pag_fast.patch(pipe, layers)
        found[name] = {"stock": stock, "patched": per_step(pipe, arguments)}
        pag_fast.unpatch(pipe)
    return found


def collect_in(tree: Path) -> dict[str, dict[str, float]]:
    """:func:`collect` with the package and the tiny pipelines of another checkout."""
    parts = [tree, tree / "tests", tree / "kernels" / "torch-ext"]
    path = os.pathsep.join(str(part) for part in parts)
    code = Path(__file__).read_text("utf-8").partition("\nif __name__ ==")[0]
    code += "\nprint(json.dumps(collect()))\n"
    code = code.replace("Path(__file__)", f"Path({str(__file__)!r})")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def added(entry: dict[str, float]) -> float:
    """Events per step that are ours."""
    return entry["patched"] - entry["stock"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to count")
    parser.add_argument("--update", action="store_true", help="write the table")
    arguments = parser.parse_args(argv)
    found = collect_in(arguments.tree.resolve())
    if arguments.update:
        TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    before, worse = json.loads(TABLE.read_text("utf-8")), 0
    print("calls per step, patched minus stock: table, now")
    for name, entry in found.items():
        print(f"{name}: {added(before[name]):.1f}, {added(entry):.1f} (stock {entry['stock']:.1f})")
        worse += added(entry) > added(before[name])
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
