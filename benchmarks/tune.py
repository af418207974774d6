"""Measure which backend and which tile is fastest on this GPU: ``python -m benchmarks.tune``.

Writes ``<chip>.json`` for ``pag_fast_kernels/configs``, which ``backend="auto"`` and the launchers
read. The file is written anew after every case: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from pag_fast_kernels import perturbed_attention
from pag_fast_kernels.launch import CONFIGS, Config, architecture, call_key, chip_name
from tqdm.auto import tqdm

from pag_fast import ops

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Case:
    """A perturbed layer of a published model: ``rows`` of v, ``attend`` of which attend."""

    model: str
    tokens: int
    heads: int
    head_dim: int
    context: int = 0
    rows: int = 3
    attend: int = 2

    @property
    def forked(self) -> int:
        return 1 if self.rows == self.attend else 0


# tokens, heads, head dimension of perturbable layers, and the text tokens of joint attention
MODELS = [
    ("SDXL 1024 mid", 1024, 20, 64, 0),
    ("SDXL 1024 up", 4096, 10, 64, 0),
    ("SD 1.5 512 mid", 64, 8, 160, 0),
    ("SD 1.5 512 up.1", 256, 8, 160, 0),
    ("SD 1.5 512 up.2", 1024, 8, 80, 0),
    ("SD 1.5 512 up.3", 4096, 8, 40, 0),
    ("SD3 1024", 4096 + 333, 24, 64, 333),
    ("PixArt 1024", 4096, 16, 72, 0),
    ("HunyuanDiT 1024", 4096, 16, 88, 0),
]
# guidance on and off, and the layer where the perturbed branch forks
MIXES = [(3, 2), (2, 1), (2, 2), (1, 1)]
CANDIDATES = [
    Config(block_m, block_n, warps, stages)
    for block_m, block_n, warps in (
        (64, 32, 4),
        (64, 64, 4),
        (64, 64, 8),
        (128, 32, 4),
        (128, 64, 4),
        (128, 64, 8),
        (128, 128, 8),
    )
    for stages in (2, 3, 4)
]


def all_cases() -> list[Case]:
    return [Case(*model, *mix) for model in MODELS for mix in MIXES]


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

        def run(config: Config = config) -> object:
            return perturbed_attention(
                q, k, v, out, num_forked=case.forked, scale=case.head_dim**-0.5, config=config,
                **mix,
            )  # fmt: skip

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
) -> Iterator[list[dict[str, Any]]]:
    """The table so far, after every case; two cases of one key: the one with more tokens counts."""
    found: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for case in cases:
        for dtype in dtypes:
            if time.monotonic() > until:
                return
            key = call_key(dtype, case.head_dim, case.tokens, case.rows, case.attend, case.context)
            if key in found and found[key][0] >= case.tokens:
                continue
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


def on_gpu(run: Callable[[], object]) -> float:
    """Median seconds, with the L2 cache cleared between runs."""
    milliseconds = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return float(milliseconds) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CONFIGS, help="folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU")
    name = torch.cuda.get_device_name()
    path = arguments.out / f"{chip_name(name)}.json"
    cases = [case for case in all_cases() if arguments.model in case.model]
    dtypes = (torch.float16, torch.bfloat16)
    until = time.monotonic() + arguments.seconds
    steps = tune(cases, dtypes, "cuda", CANDIDATES, on_gpu, until)
    for entries in tqdm(steps, total=len(cases) * len(dtypes), unit="case"):
        write_table(path, entries, name, architecture(None))
        print(json.dumps(entries[-1]))
    print(path)


if __name__ == "__main__":
    main()
