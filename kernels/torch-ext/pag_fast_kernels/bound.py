"""Launches that are prepared once for every shape: afterwards only addresses and scales change.

A launch by ``kernel[grid](…)`` binds arguments, looks at every one of them and finds the binary by
a string that is made of what it saw: 150 calls of Python and C before the driver is asked. What
comes out of that depends on dtypes, shapes, strides and alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch

from .launch import on_device

# prepared launches of a kernel; videos of many sizes would fill a process's memory
MOST = 1024
ALIGNMENT = 16  # bytes, of the widest load
# kernels count a row's elements in 32 bits
MOST_IN_A_ROW = 2**31

_dtype_of = attrgetter("dtype")

# grid, integers and constants in the kernel's order, options of the launch
Prepared = tuple[tuple[int, ...], Sequence[int], dict[str, Any], dict[str, int]]


class Launcher:
    """Launches a kernel whose parameters are pointers, fp32 numbers, integers, constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.bound: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def __call__(
        self,
        key: Hashable,
        pointers: Sequence[torch.Tensor],
        numbers: Sequence[float],
        prepare: Callable[[], Prepared],
    ) -> None:
        """Launch it on the device of the first pointer.

        Args:
            key: of everything that ``prepare`` looks at, and the device; ``None`` where some
                pointer is not aligned: the binary depends on which. Dtypes are added here.
            numbers: Python floats.
            prepare: called where ``key`` is new.
        """
        if key is not None:
            # a binary is compiled for the dtype of every pointer, also of those that are not read
            key = key, *map(_dtype_of, pointers)
        with on_device(pointers[0]):
            found = self.bound.get(key)
            if found is not None:
                run, rest = found
                run(*pointers, *numbers, *rest)
                return
            grid, integers, constants, options = prepare()
            if 0 in grid:
                return  # nothing to compute, and an empty grid is an error of CUDA
            binary = self.kernel[grid](*pointers, *numbers, *integers, **constants, **options)
        if key is None or not hasattr(binary, "launch_metadata"):
            return  # the interpreter has no binaries
        if len(self.bound) >= MOST:
            self.bound.clear()
        names = self.kernel.arg_names[len(pointers) + len(numbers) + len(integers) :]
        rest = (*integers, *(constants[name] for name in names))
        self.bound[key] = binary[(*grid, 1, 1)[:3]], rest


def laid_out(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors [rows, N, …] as kernels address them, copied where they lie in another way.

    A kernel adds a channel's number to the address of its head, and counts a row's elements in 32
    bits: the last stride has to be 1, and that of tokens small.
    """
    return [
        x
        if (stride := x.stride())[-1] == 1 and x.shape[1] * stride[1] < MOST_IN_A_ROW
        else x.contiguous()
        for x in tensors
    ]


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every one begins on 16 bytes."""
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    return addresses % ALIGNMENT == 0


def stride_unit(x: torch.Tensor, strides: Sequence[int], starts_aligned: bool) -> int:
    """Elements in 16 bytes if every stride is a multiple of that, else 1.

    Kernels get strides in this unit, a constant. Triton only asks whether an integer is a multiple
    of 16: with heads of 40, 72 or 88 channels, where the stride of a head is not, it would load
    elements one by one, though all rows begin on 16 bytes.
    """
    unit = ALIGNMENT // x.element_size()
    return unit if starts_aligned and all(stride % unit == 0 for stride in strides) else 1
