"""Launches that are prepared once for every shape: afterwards only addresses and scales change.

A launch by ``kernel[grid](…)`` binds arguments, looks at every one of them and finds the binary by
a string that is made of what it saw: 150 calls of Python and C before the driver is asked. What
comes out of that depends on dtypes, shapes, strides and alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .launch import on_device

# prepared launches of a kernel; videos of many sizes would fill a process's memory
MOST = 1024
ALIGNMENT = 16  # bytes, of the widest load

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
            key: of everything that ``prepare`` looks at, the device and the dtypes; ``None``
                where some pointer is not aligned: the binary depends on which.
            numbers: Python floats.
            prepare: called where ``key`` is new.
        """
        with on_device(pointers[0]):
            found = self.bound.get(key)
            if found is not None:
                run, rest = found
                run(*pointers, *numbers, *rest)
                return
            grid, integers, constants, options = prepare()
            binary = self.kernel[grid](*pointers, *numbers, *integers, **constants, **options)
        if key is None or not hasattr(binary, "launch_metadata"):
            return  # the interpreter has no binaries
        if len(self.bound) >= MOST:
            self.bound.clear()
        names = self.kernel.arg_names[len(pointers) + len(numbers) + len(integers) :]
        rest = (*integers, *(constants[name] for name in names))
        self.bound[key] = binary[(*grid, 1, 1)[:3]], rest


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
