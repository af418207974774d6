"""Prepared launches: what they remember, and what they leave to Triton. No kernel runs here."""

from __future__ import annotations

import sys

import pytest
import torch
from pag_fast_kernels.bound import MOST, Launcher, aligned, laid_out, stride_unit


class _Binary:
    """As Triton's: launched by ``binary[grid](…)``, with the constants among the arguments."""

    launch_metadata = None

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append((grid, arguments))


class _Kernel:
    arg_names = ("x_ptr", "y_ptr", "scale", "stride", "heads", "SECOND", "FIRST")

    def __init__(self, binary):
        self.binary = binary
        self.whole = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.whole.append((grid, arguments, options))
            return self.binary

        return run


def _prepare(stride=3):
    return (7, 2), (stride, 5), {"FIRST": 1, "SECOND": 2}, {"num_warps": 4}


def test_the_second_launch_goes_straight_to_the_binary():
    log = []
    kernel = _Kernel(_Binary(log))
    launch = Launcher(kernel)
    x, y = torch.zeros(4), torch.ones(4)
    asked = []
    for scale in (0.5, 0.25):
        launch("key", (x, y), (scale,), lambda: asked.append(1) or _prepare())
    assert kernel.whole == [((7, 2), (x, y, 0.5, 3, 5), {"FIRST": 1, "SECOND": 2, "num_warps": 4})]
    # constants in the kernel's order, three numbers of blocks
    assert log == [((7, 2, 1), (x, y, 0.25, 3, 5, 2, 1))]
    assert asked == [1]


def test_other_keys_and_none_are_prepared():
    log = []
    kernel = _Kernel(_Binary(log))
    launch = Launcher(kernel)
    x = torch.zeros(4)
    for key in ("one", "two", None, None):
        launch(key, (x, x), (1.0,), _prepare)
    assert len(kernel.whole) == 4
    assert log == []
    assert {key for key, *_ in launch.bound} == {"one", "two"}


@pytest.mark.parametrize("pointer", [0, 1])
def test_a_binary_is_of_the_dtypes_of_all_pointers(pointer):
    launch = Launcher(_Kernel(_Binary([])))
    for dtype in (torch.float32, torch.float16):
        pointers = [torch.zeros(4), torch.zeros(4)]
        pointers[pointer] = pointers[pointer].to(dtype)
        launch("key", pointers, (1.0,), _prepare)
    assert len(launch.kernel.whole) == len(launch.bound) == 2


def test_an_empty_grid_is_not_launched():
    launch = Launcher(_Kernel(_Binary([])))
    launch("key", (torch.zeros(0), torch.zeros(0)), (1.0,), lambda: ((7, 0), (), {}, {}))
    assert launch.kernel.whole == [] and not launch.bound


def test_the_interpreter_has_no_binaries():
    launch = Launcher(_Kernel(None))
    x = torch.zeros(4)
    for _ in range(2):
        launch("key", (x, x), (1.0,), _prepare)
    assert len(launch.kernel.whole) == 2


def test_it_does_not_grow_without_end():
    launch = Launcher(_Kernel(_Binary([])))
    x = torch.zeros(4)
    for key in range(MOST + 5):
        launch(key, (x, x), (1.0,), _prepare)
    assert len(launch.bound) <= MOST


def test_what_kernels_cannot_address_is_copied():
    x = torch.empty(2, 8, 4, 16, device="meta")
    columns = torch.empty(2, 8, 4, 32, device="meta")[..., ::2]
    # eight times the stride of a token passes 32 bits
    far = torch.empty_strided((2, 8, 4, 16), (64, 2**28, 16, 1), device="meta")
    near = torch.empty_strided((2, 8, 4, 16), (64, 2**27, 16, 1), device="meta")
    found = laid_out(x, columns, far, near)
    assert found[0] is x and found[3] is near
    assert [y.stride() for y in found[1:3]] == [x.stride()] * 2


def test_alignment():
    x = torch.zeros(64, dtype=torch.float16)
    assert aligned(x, x[8:])
    assert not aligned(x, x[1:])


@pytest.mark.parametrize(
    ("dtype", "strides", "expected"),
    [
        (torch.float16, (40 * 8 * 100, 40 * 8, 40), 8),
        (torch.float32, (40 * 8 * 100, 40 * 8, 40), 4),
        (torch.float16, (36 * 8, 36), 1),
        (torch.float32, (36 * 8, 36), 4),
        (torch.float16, (0, 88), 8),
    ],
)
def test_the_unit_of_strides(dtype, strides, expected):
    x = torch.zeros(1, dtype=dtype)
    assert stride_unit(x, strides, True) == expected
    assert stride_unit(x, strides, False) == 1


def _calls(run):
    """Python and C functions that ``run`` calls, itself left out."""
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count - 2


def test_calls_of_a_prepared_launch(monkeypatch):
    """From the launcher's own code to the binary: Triton's way to there takes 150."""
    module = sys.modules["pag_fast_kernels.perturbed_attention"]
    log = []

    class Kernel(_Kernel):
        arg_names = module._launch.kernel.arg_names

    monkeypatch.setattr(module._launch, "kernel", Kernel(_Binary(log)))
    monkeypatch.setattr(module._launch, "bound", {})
    q, k, v, out = (torch.randn(2, 64, 2, 16) for _ in range(4))

    def run():
        module.perturbed_attention(q, k, v, out, num_attend=1, num_context=5, scale=0.25)

    run()
    assert log == []
    assert _calls(run) <= 45
    assert len(log) == 1
    grid, arguments = log[0]
    assert grid[1:] == (1, 1)
    assert len(arguments) == len(Kernel.arg_names)
