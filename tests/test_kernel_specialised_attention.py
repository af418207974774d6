"""Attending rows by specialised warps: in the interpreter against fp64, and compiled for a chip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launches import launches  # noqa: F401
from numerics import assert_close_as_torch, attention_rounding
from pag_fast_kernels import launch, perturbed_attention
from pag_fast_kernels.launch import INTERPRETED, Config, Measured, call_key
from pag_fast_kernels.specialised_attention import takes

from pag_fast.ops import reference

ROOT = Path(__file__).parent.parent
NAME = "_specialised_attention_fwd_kernel"
TILE = Config(64, 32, 4, 2, specialised=True)
# the interpreter multiplies bf16 wrongly, and does not say so
DTYPES = [torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
pytestmark = pytest.mark.usefixtures("poisoned")
MIXES = {"cfg": (3, 2, 0), "cfg off": (2, 1, 0), "fork": (2, 2, 1), "all attend": (2, 2, 0)}


def _plain(dtype, rows, tokens, heads, dim):
    return [torch.randn(rows, tokens, heads, dim).to(dtype) for _ in range(3)]


def _fused(dtype, rows, tokens, heads, dim):
    return list(torch.randn(rows, tokens, 3, heads, dim).to(dtype).unbind(2))


def _check(q, k, v, num_attend, num_forked, config=TILE):
    q, k = q[:num_attend], k[:num_attend]
    out = v.new_empty((len(v) + num_forked, *v.shape[1:]))
    scale, mix = v.shape[-1] ** -0.5, {"num_attend": num_attend, "num_forked": num_forked}
    perturbed_attention(q, k, v, out, scale=scale, config=config, **mix)
    truth = reference.perturbed_attention(q.double(), k.double(), v.double(), **mix)
    same = reference.perturbed_attention(q, k, v, **mix)
    rounding = torch.zeros_like(truth)
    rounding[:num_attend] = attention_rounding(q, k, v[:num_attend], scale, None)
    assert_close_as_torch(out, same, truth, rounding)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("layout", [_plain, _fused])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(mix, layout, dtype, launches):  # noqa: F811
    rows, attend, forked = mix
    _check(*layout(dtype, rows, 128, 2, 64), attend, forked)
    assert launches == [NAME]


@pytest.mark.parametrize(
    ("tokens", "dim", "tile"),
    [
        (64, 64, TILE),
        (128, 128, Config(64, 64, 4, 2, specialised=True)),
        (256, 64, Config(128, 128, 4, 2, specialised=True)),
    ],
)
def test_sizes(tokens, dim, tile, launches):  # noqa: F811
    _check(*_plain(torch.float16, 2, tokens, 3, dim), 1, 0, tile)
    assert launches == [NAME]


@pytest.mark.parametrize("sigma", [8.0, 40.0])
def test_steep_scores(sigma, launches):  # noqa: F811
    q, k, v = _plain(torch.float16, 1, 64, 1, 64)
    _check(q * sigma, k * sigma, v, 1, 0)
    assert launches == [NAME]


def test_a_picture_does_not_see_the_next_one(launches):  # noqa: F811
    q, k, v = _plain(torch.float16, 3, 64, 2, 64)
    for x in (q, k, v):
        x[1] = float("nan")
    out = torch.empty_like(v)
    perturbed_attention(q, k, v, out, num_attend=3, scale=0.125, config=TILE)
    assert launches == [NAME]
    assert out[1].isnan().all() and not out[::2].isnan().any()


def _other_tokens():
    return _plain(torch.float16, 2, 80, 1, 64)


def _other_width():
    return _plain(torch.float16, 2, 64, 1, 80)


def _other_dtype():
    return _plain(torch.float32, 2, 64, 1, 64)


def _not_aligned():
    return [x[..., 1:65] for x in _plain(torch.float16, 2, 64, 1, 72)]


def _not_flat():
    return [x.transpose(1, 2) for x in _plain(torch.float16, 2, 2, 64, 64)]


def _sliced():
    return [x[:, 16:] for x in _plain(torch.float16, 3, 80, 1, 64)]


CASES = [_other_tokens, _other_width, _other_dtype, _not_aligned, _not_flat, _sliced]


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__.strip("_"))
def test_what_it_does_not_take_runs_as_ever(make, launches):  # noqa: F811
    q, k, v = make()
    _check(q, k, v, len(v) - 1, 0)
    assert launches == ["_perturbed_attention_fwd_kernel"]


def test_a_table_chooses_it(monkeypatch, launches):  # noqa: F811
    q, k, v = _plain(torch.float16, 2, 64, 1, 64)
    table = {call_key(v.dtype, 64, 64, 2, 1, 0): Measured("triton", TILE)}
    monkeypatch.setattr(launch, "measured_on", lambda *_: table)
    _check(q, k, v, 1, 0, None)
    # text tokens, and lengths of the same bucket that it does not take
    _check(*_plain(torch.float16, 2, 50, 1, 64), 1, 0, None)
    assert launches == [NAME, "_perturbed_attention_fwd_kernel"]


COMPILE = """
import sys
import torch
from pag_fast_kernels import specialised_attention as module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
chip, block, dim = map(int, sys.argv[1:])
tiles = {name: f"tensordesc<fp16[{block}, {dim}]>" for name in ("q_desc", "k_desc", "v_desc")}
kernel = module._specialised_attention_fwd_kernel
signature = {**tiles, "out_ptr": "*fp16", "qk_scale": "fp32"}
signature |= {name: "i32" for name in module._INTEGERS}
constants = {"UNIT": 8, "HEAD_DIM": dim, "BLOCK_M": block, "BLOCK_N": block, "STAGES": 2}
signature |= {name: "constexpr" for name in constants}
source = ASTSource(kernel, signature, constants, {(3,): [["tt.divisibility", 16]]})
made = compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4})
print("setmaxnreg" in made.asm["ptx"], "bulk.tensor" in made.asm["ptx"], made.metadata.num_warps)
"""


@pytest.mark.parametrize("chip", [90, 100])
def test_warps_are_specialised(chip):
    """Registers go from one group of warps to another, and tiles come by TMA."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(chip), "64", "64"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    specialised, tma, warps = done.stdout.split()
    assert (specialised, tma) == ("True", "True") and int(warps) > 4


def test_queries_of_other_sizes_are_not_taken():
    q, k, v = _plain(torch.float16, 1, 64, 1, 64)
    assert takes(q, k, v, v, TILE)
    assert not takes(q, k, v, v, Config(128, 32, 4, 2, specialised=True))
