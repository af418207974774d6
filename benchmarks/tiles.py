"""The calls to tune and the tiles to try, and processes that compile them ahead.

Compiling takes longer than measuring: other processes compile the tiles of the cases ahead into
Triton's cache and run nothing, so that the GPU is the measurement's alone.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import torch
from pag_fast_kernels import perturbed_attention
from pag_fast_kernels.launch import Config
from pag_fast_kernels.specialised_attention import takes


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


# tokens, heads, head dimension of perturbable layers, and the text tokens of joint attention; what
# gains most from a kernel first, in case time runs out
MODELS = [
    ("SD3 1024", 4096 + 333, 24, 64, 333),
    ("Flux 1024", 4096 + 512, 24, 128, 512),
    ("SDXL 1024 mid", 1024, 20, 64, 0),
    ("SDXL 1024 up", 4096, 10, 64, 0),
    ("PixArt 1024", 4096, 16, 72, 0),
    ("HunyuanDiT 1024", 4096, 16, 88, 0),
    ("SD 1.5 512 mid", 64, 8, 160, 0),
    ("SD 1.5 512 up.1", 256, 8, 160, 0),
    ("SD 1.5 512 up.2", 1024, 8, 80, 0),
    ("SD 1.5 512 up.3", 4096, 8, 40, 0),
]
SAMPLES = 15
DTYPES = [torch.float16, torch.bfloat16]
# rows and attending rows: guidance on and off, and the layer where the perturbed branch forks
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
# of warps that specialise: sm_90 and sm_100 alone, see pag_fast_kernels/specialised_attention.py
SPECIALISED = [
    Config(block_m, block_n, 4, stages, specialised=True)
    for block_m, block_n in ((64, 64), (64, 128), (128, 64), (128, 128))
    for stages in (2, 3)
]


def runs(case: Case, config: Config, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a launch of ``case`` on q, k, v and out is one with that tile."""
    attending = [x[: case.attend] for x in tensors]
    return not config.specialised or (not case.context and takes(*attending, config))


def all_cases() -> list[Case]:
    return [Case(*model, *mix) for model in MODELS for mix in MIXES]


def launch(
    case: Case, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> object:
    """The kernel of ``case``, into ``out``."""
    return perturbed_attention(
        q, k, v, out, num_attend=case.attend, num_context=case.context, num_forked=case.forked,
        scale=case.head_dim**-0.5, config=config,
    )  # fmt: skip


# ---- compiling ahead ----


def compile_only() -> None:
    """From now on this process compiles kernels where it would launch them."""
    from triton.runtime import jit

    run = jit.JITFunction.run

    def compiled(self: Any, *args: Any, **options: Any) -> None:
        # no binary is handed out: binding one for later launches would load it
        run(self, *args, **{**options, "warmup": True})

    jit.JITFunction.run = compiled


def compile_case(case: Case, dtype: torch.dtype, config: Config, device: str) -> None:
    """What ``tune_case`` launches for one tile, compiled into the cache of Triton."""
    shape = (case.rows, case.tokens, case.heads, case.head_dim)
    q, k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    if not case.context:
        q, k = q[: case.attend], k[: case.attend]
    out = v.new_empty((case.rows + case.forked, *shape[1:]))
    if runs(case, config, (q, k, v, out)):
        launch(case, config, q, k, v, out)


class Ahead:
    """Compiles in ``workers`` processes, in the order in which cases will be measured.

    Args:
        until: when ``time.monotonic`` says that, nobody waits any longer.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        dtypes: Sequence[torch.dtype],
        candidates: Sequence[Config],
        workers: int,
        until: float,
        device: str = "cuda",
    ) -> None:
        # CUDA does not outlive a fork
        context = multiprocessing.get_context("spawn")
        self._pool = futures.ProcessPoolExecutor(workers, context, compile_only)
        self._until = until
        self._jobs = {
            (case, dtype): [
                self._pool.submit(compile_case, case, dtype, config, device)
                for config in candidates
            ]
            for case in cases
            for dtype in dtypes
        }

    def ready(self, case: Case, dtype: torch.dtype) -> None:
        """Wait for the tiles of a case; what did not compile shows when it is measured."""
        left = self._until - time.monotonic()
        futures.wait(self._jobs[case, dtype], None if left == float("inf") else max(0.0, left))

    def stop(self) -> None:
        """Begin nothing more; a worker that compiles ends with its tile."""
        self._pool.shutdown(wait=False, cancel_futures=True)
