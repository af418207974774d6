"""What ``benchmarks/gpu_suite.sh`` runs: stages of at most eight minutes, each of which runs alone.

A part is a process with a time limit of its own. Within a stage, what would be missed most comes
first: time may run out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

STAGE_SECONDS = 470.0
KERNELS = [
    f"tests/test_kernel_{name}.py"
    for name in (
        "perturbed_attention",
        "linear_attention",
        "qk_norm_rope",
        "combine_guidance",
        "noisy_attention",
        "received_attention",
        "degrade_latents",
        "ops",
    )
]
SDXL, REST = "SDXL and not ControlNet", "not SDXL and not emoji"


@dataclass(frozen=True)
class Part:
    """A command of a stage. In its words ``{rows}`` is the file for its results, ``{folder}`` a
    folder for anything else, ``{jobs}`` and ``{workers}`` are numbers of processes, and
    ``{seconds}`` is how long it may begin cases.

    Attributes:
        seconds: its limit.
        last: seconds that it needs to end by itself, with a case that has just begun.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    last: float = 15.0


def _tests(name: str, seconds: float, *files: str) -> Part:
    words = (sys.executable, "-m", "pytest", "-q", "{jobs}", *files)
    return Part(name, seconds, words)


def _bench(
    name: str, seconds: float, file: str, which: str, *options: str, last: float = 30.0
) -> Part:
    # a session that ends by itself has passed, and its results can be compared
    words = (sys.executable, "-m", "pytest", "-q", f"benchmarks/{file}.py", "-k", which)
    words += ("--rows", "{rows}", "--seconds", "{seconds}", *options)
    return Part(name, seconds, words, last)


_NO = ("--compiled", "no")
# of a call's first steps each runs as it is written: a graph pays over a whole call
_CALL = ("--steps", "20")
_COMPILED = ("--compiled", "yes", "--graphs", "no", "--rounds", "5")
_GRAPHS = (*_NO, "--graphs", "yes", *_CALL)
STAGES: dict[str, list[Part]] = {
    "check": [
        _tests("kernels", 260, *KERNELS),
        _tests("pipelines", 200, "tests/test_kernel_pipelines.py"),
    ],
    "tune": [
        Part(
            "tune",
            STAGE_SECONDS,
            (sys.executable, "-m", "benchmarks.tune", "--out", "{folder}/configs")
            + ("--seconds", "{seconds}", "--workers", "{workers}"),
        )
    ],
    "step": [
        _bench("sdxl", 100, "bench_step", SDXL, *_NO, *_CALL),
        # the fastest that stock can do, in one run with what it is compared to
        _bench("sdxl and stock compiled", 200, "bench_step", SDXL, "--compiled", "stock", *_CALL),
        _bench("pictures", 80, "bench_pipeline", "sdxl or emoji", *_NO),
        _bench("others", 180, "bench_step", "not SDXL or ControlNet", *_NO, "--graphs", "no"),
    ],
    "ops": [
        _bench("ops", 220, "bench_ops", "test", *_NO),
        _bench("layers, stock compiled", 240, "bench_ops", "layer or combine", "--compiled", "yes"),
    ],
    "compiled": [
        _bench("sdxl", 300, "bench_step", SDXL, *_COMPILED),
        _bench("others", 240, "bench_step", REST, *_COMPILED, last=120.0),
    ],
    "graphs": [
        _bench("sdxl", 120, "bench_step", SDXL, *_GRAPHS),
        _bench("pictures", 100, "bench_pipeline", "sdxl or emoji", *_GRAPHS),
        _bench("others", 240, "bench_step", "not SDXL", *_GRAPHS),
    ],
}
