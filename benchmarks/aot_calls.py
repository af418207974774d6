"""What the launchers launch, without a device: calls with tensors of the meta device.

A binary depends on which pointers and strides Triton knows to be aligned. Here that is found out
as in a launch: by the launcher, from the strides of tensors as models lay them out. A table of
attributes that says more than a launch knows certifies binaries that never run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pag_fast_kernels as kernels
import torch
from pag_fast_kernels import launch
from pag_fast_kernels.bound import Launcher
from pag_fast_kernels.received_attention import tile as received_tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

HEAD_DIMS = (32, 40, 64, 72, 80, 88, 96, 128, 160, 256)
# of the other dtypes: bf16 has the loads of fp16, and had its registers within four in 539 of 552
# binaries; fp32 is there for completeness
FEWER = {"fp16": HEAD_DIMS, "bf16": (64, 88), "fp32": (64, 128)}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS, HEADS, TEXT = 4096, 16, 333


@dataclass(frozen=True)
class Build:
    """A name, the call, which of its launches is meant, and what the gate has to know of it."""

    name: str
    call: Callable[[], object]
    dtype: str
    head_dim: int = 0
    which: int = -1
    # how many loads and stores in it may be of two bytes
    narrow: int = 0


@dataclass(frozen=True)
class Launch:
    """What a launcher gave to a kernel."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def source(self, chip: int | str) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
        """For ``triton.compile``: what Triton makes of the arguments when it launches."""
        gpu = isinstance(chip, int)
        wave = 64 if chip == "gfx942" else 32
        chip_target = GPUTarget("cuda" if gpu else "hip", chip, wave)
        backend = make_backend(chip_target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.arguments, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return source, chip_target, options.__dict__


class _Recorder:
    """Stands for a kernel in its launcher: keeps what it is launched with."""

    def __init__(self, kernel: Any, seen: list[Launch]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.seen.append(
            Launch(self.kernel, arguments, options)
        )


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    seen: list[Launch] = []
    modules = [module for name, module in sys.modules.items() if "pag_fast_kernels." in name]
    launchers = {x for module in modules for x in vars(module).values() if isinstance(x, Launcher)}
    stood = {launcher: launcher.kernel for launcher in launchers}
    for launcher, kernel in stood.items():
        launcher.kernel = _Recorder(kernel, seen)
    try:
        yield seen
    finally:
        for launcher, kernel in stood.items():
            launcher.kernel = kernel


def generation_of(chip: int | str) -> str:
    """As :func:`pag_fast_kernels.launch.generation`, without the chip."""
    if isinstance(chip, str):
        return "mfma" if chip == "gfx942" else "wmma"
    return launch.nvidia_generation(chip // 10)


def launched(build: Build, chip: int | str) -> Launch:
    """What is launched on such a chip."""
    with launch.target(generation_of(chip)), _recorded() as seen:
        build.call()
    return seen[build.which]


def qkv(dtype: str, head_dim: int, rows: int = 3, layout: str = "plain") -> list[torch.Tensor]:
    """q, k and v: of one projection each, of a fused one, or slices of more tokens."""
    shape = (rows, TOKENS, HEADS, head_dim)
    kind = {"dtype": DTYPES[dtype], "device": "meta"}
    if layout == "fused":
        return list(torch.empty(rows, TOKENS, 3, HEADS, head_dim, **kind).unbind(2))
    if layout == "sliced":
        whole = (torch.empty(rows + 1, TOKENS + 7, HEADS, head_dim, **kind) for _ in range(3))
        return [x[1:, 7:] for x in whole]
    return [torch.empty(shape, **kind) for _ in range(3)]


def attention_build(
    dtype: str,
    head_dim: int,
    *,
    joint: bool = False,
    perturbation: str = "identity",
    bias: bool = False,
    layout: str = "plain",
    config: launch.Config | None = None,
) -> Build:
    """One attention kernel, with the default tile unless given another."""

    def call() -> None:
        q, k, v = qkv(dtype, head_dim, layout=layout)
        if not joint and perturbation == "identity":
            q, k = q[:2], k[:2]
        options: dict[str, Any] = {}
        if bias:
            options["key_bias"] = v.new_empty(1, 1, TOKENS).expand(len(q), HEADS, TOKENS)
        if perturbation == "soft":
            options["strength"] = torch.empty(HEADS, device="meta")
        kernels.perturbed_attention(
            q, k, v, v.new_empty(v.shape), num_attend=2, num_context=TEXT if joint else 0,
            scale=0.1, perturbation=perturbation, config=config, **options,
        )  # fmt: skip

    words = ["perturbed_attention", dtype, f"D={head_dim}", "joint" * joint]
    words += [perturbation.replace("identity", ""), "bias" * bias, layout.replace("plain", "")]
    # a bias is one number a key, and a thread
    return Build(" ".join(filter(None, words)), call, dtype, head_dim, narrow=99 * bias)


def attention_builds(dtype: str) -> Iterator[Build]:
    """Every head dimension with and without text; in fp16 also the variants, and other layouts."""
    for head_dim in FEWER[dtype]:
        for joint in (False, True):
            yield attention_build(dtype, head_dim, joint=joint)
        if dtype == "fp16" and head_dim in (40, 64, 72, 80, 88):
            for layout in ("fused", "sliced"):
                yield attention_build(dtype, head_dim, layout=layout)
    if dtype == "fp16":
        for joint in (False, True):
            for perturbation in ("soft", "blur"):
                yield attention_build(dtype, 64, joint=joint, perturbation=perturbation)
        yield attention_build(dtype, 64, bias=True)


def noisy_builds(dtype: str) -> Iterator[Build]:
    """Attention with noise on its scores: a head dimension that is a power of two, and one not."""
    for head_dim in (64, 80) if dtype != "fp32" else (64,):

        def call(head_dim: int = head_dim) -> None:
            q, k, v = qkv(dtype, head_dim)
            clock = torch.empty(1, dtype=torch.int64, device="meta")
            kernels.noisy_attention(q, k, v, v.new_empty(v.shape), clock=clock, scale=0.1)

        yield Build(f"noisy_attention {dtype} D={head_dim}", call, dtype, head_dim)


def received_builds(dtype: str, generation: str) -> Iterator[Build]:
    """Self-Attention Guidance's column sums: both launches, and the one of a small map."""
    for head_dim in {"fp16": (40, 64, 80, 128, 160), "bf16": (), "fp32": (64, 128)}[dtype]:
        if dtype == "fp32" and generation == "wmma" and head_dim > 96:
            continue  # the op does not ask for it

        def call(tokens: int | None = None, head_dim: int = head_dim) -> None:
            q, k, _ = qkv(dtype, head_dim)
            kernels.received_attention(q[:, :tokens], k[:, :tokens], scale=0.1)

        def whole(call: Callable[[int], None] = call, head_dim: int = head_dim) -> None:
            call(received_tile(generation, DTYPES[dtype], head_dim).block_n)

        name = f"received_attention {dtype} {{}} D={head_dim}"
        yield Build(name.format("lse"), call, dtype, head_dim, which=0)
        yield Build(name.format("columns"), call, dtype, head_dim)
        yield Build(name.format("whole"), whole, dtype, head_dim)


def other_builds(dtype: str) -> Iterator[Build]:
    """Sana's, HunyuanDiT's and the guidances' kernels, as the pipelines launch them."""
    kind = {"dtype": DTYPES[dtype], "device": "meta"}
    floats = {"dtype": torch.float32, "device": "meta"}

    def linear() -> None:
        q, k, v = qkv(dtype, 32)
        out = v.new_empty(v.shape)
        kernels.linear_attention(q[:2], k[:2], v, out, num_attend=2, num_forked=0)

    def rope() -> None:
        q, k, _ = qkv(dtype, 88)
        affine = torch.empty(88, **kind), torch.empty(88, **kind)
        rotary = torch.empty(TOKENS, 88, **floats), torch.empty(TOKENS, 88, **floats)
        kernels.qk_norm_rope(q, k, affine, affine, rotary, eps=1e-6)

    def degrade() -> None:
        x = torch.empty(2, 4, 64, 64, **kind)
        received, blur = torch.empty(2, 64, **floats), torch.empty(4, 1, 9, 9, **floats)
        kernels.degrade_latents(
            x, x, received, blur, map_size=(8, 8), clean=(1.0, 1.0), noise=(1.0, 1.0)
        )

    def combine(size: int, rescale: float, mode: str) -> None:
        rows = torch.empty(6, 4, size, size, **kind)
        kernels.combine_guidance(
            *rows.chunk(3), guidance_scale=7.0, pag_scale=3.0, rescale=rescale, rescale_mode=mode
        )

    yield Build(f"linear_attention {dtype} state D=32", linear, dtype, 32, which=0)
    yield Build(f"linear_attention {dtype} apply D=32", linear, dtype, 32)
    # weight and bias, one number a thread
    yield Build(f"qk_norm_rope {dtype} D=88", rope, dtype, narrow=2)
    # a stencil
    yield Build(f"degrade_latents {dtype}", degrade, dtype, narrow=99)
    for size, words in ((128, ""), (1024, " large")):
        for name, rescale, mode, which in (
            (" moments", 0.7, "cfg", 0),
            ("", 0.0, "cfg", -1),
            (" rescale", 0.7, "cfg", -1),
            (" rescale term", 0.7, "full", -1),
        ):
            call = functools.partial(combine, size, rescale, mode)
            yield Build(f"combine_guidance {dtype}{name}{words}", call, dtype, which=which)


def builds(dtype: str, chip: int | str) -> Iterator[Build]:
    """What the package launches on a chip."""
    if chip in (86, 89) and dtype != "fp16":
        return  # where sm_80 is looked at
    if chip == 89:
        # all of its 206 binaries were those of sm_86
        yield from (attention_build(dtype, head_dim) for head_dim in (64, 88, 128))
        return
    yield from attention_builds(dtype)
    yield from noisy_builds(dtype)
    yield from received_builds(dtype, generation_of(chip))
    if dtype != "bf16":
        yield from other_builds(dtype)
