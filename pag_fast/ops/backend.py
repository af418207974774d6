"""Which backend runs an op: PyTorch, or the Triton kernels of ``pag_fast_kernels``."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

BACKENDS = ("auto", "torch", "triton")
OLDEST_TRITON = (3, 6)
# Triton's interpreter is for tests: "auto" does not even import it
_LEFT_ALONE = ("cpu",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# kernels count elements within a row in 32 bits
MOST_IN_A_ROW = 2**31

# why the kernel of an op cannot do what a call asks for, given the tensor that decides
Unfit = Callable[[torch.Tensor], "str | None"]

_LIBRARY = torch.library.Library("pag_fast", "DEF")
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each op runs, by its qualified name: for looking inside."""


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the op ``pag_fast::<schema>`` for every device, and its shape inference.

    On a ``Library`` rather than by the ``custom_op`` decorator, whose Python layers cost 10 to
    25 µs in every call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pag_fast::{name}", fake, lib=_LIBRARY)
    IMPLEMENTATIONS[f"pag_fast::{name}"] = run


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name, or ``"triton"`` without the kernels installed."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if backend == "triton" and not _installed():
        raise ValueError(
            "backend='triton' needs triton 3.6 or newer and the package pag_fast_kernels, and one "
            "of them is not installed; backend='auto' or 'torch' works without them."
        )


def too_large(tensor: torch.Tensor) -> str | None:
    """Why a kernel cannot address a row of ``tensor``, or ``None``."""
    elements = tensor.numel() // max(1, tensor.shape[0])
    if elements < MOST_IN_A_ROW:
        return None
    return f"the kernels count elements of a row in 32 bits, and a row has {elements}"


def too_wide(tensor: torch.Tensor, widest: int) -> str | None:
    """As :func:`too_large`, also for more than ``widest`` channels a head."""
    if tensor.shape[-1] <= widest:
        return too_large(tensor)
    return f"the kernel takes heads of up to {widest} channels, not of {tensor.shape[-1]}"


def resolve_backend(
    backend: str,
    tensor: torch.Tensor,
    *,
    unfit: Unfit = too_large,
    default: str | Callable[[], str],
) -> str:
    """``"torch"`` or ``"triton"`` for one call of an op.

    Args:
        tensor: its device and dtype have to be among those the kernels run on.
        unfit: says what the kernel of the op cannot do of what this call asks for, if anything. It
            is asked where kernels could run.
        default: what ``"auto"`` means on a chip that the kernels were measured on. On others it
            means PyTorch.

    Raises:
        ValueError: ``"triton"`` asked for where the kernels do not run.
    """
    if is_left_alone(backend, tensor):
        return "torch"
    check_backend(backend)
    device = tensor.device
    why = _nowhere(tensor) or unfit(tensor)
    runs = why is None
    if backend == "auto":
        # a chip that nobody has run the kernels on may have surprises
        if not runs or not is_measured(device.type, device.index):
            return "torch"
        return default if isinstance(default, str) else default()
    if not runs:
        raise ValueError(
            f"backend='triton' cannot run this call on {device} in {tensor.dtype}: {why}. "
            "backend='auto' falls back to PyTorch."
        )
    return "triton"


def _nowhere(tensor: torch.Tensor) -> str | None:
    """Why no kernel takes tensors of that device and dtype."""
    device, dtype = tensor.device, tensor.dtype
    if dtype not in DTYPES:
        return "the kernels take fp16, bf16 and fp32"
    if not runs_kernels(device.type, device.index):
        return (
            "the kernels run on NVIDIA GPUs from compute capability 8.0 on and on AMD gfx942 and "
            "gfx1100"
        )
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bf16 products wrongly, and does not say so"
    return None


def is_left_alone(backend: str, tensor: torch.Tensor) -> bool:
    """Whether PyTorch runs the op whatever the call looks like."""
    return backend == "torch" or (backend == "auto" and tensor.device.type in _LEFT_ALONE)


def is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether derivatives go through a call: it then runs in PyTorch, out of place and as no op.

    Kernels have no derivative, and an op cuts the graph, for compilers and dispatch modes, too.
    Inside of a level of forward-mode differentiation any tensor may have a tangent, also where
    gradients are off.
    """
    # what follows is calls, and there is a level for nearly nobody
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_unwatched(x: torch.Tensor) -> bool:
    """Whether nobody would see the difference between an op and a call of what it runs.

    Dispatching an op costs 10 to 30 µs of Python. Compilers, counters, fake tensors and other
    subclasses need it; plain eager execution does not.
    """
    # a compiler would trace into the rest
    if torch.compiler.is_compiling():
        return False
    return type(x) is torch.Tensor and not is_in_torch_dispatch_mode()


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled code takes what ``function`` returns as a constant.

    This is what ``torch.compiler.assume_constant_result`` does, which imports the whole compiler
    to do it: half of the time that an import of pag_fast took.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def runs_kernels(device_type: str, index: int | None) -> bool:
    """Whether the Triton kernels run on that device; on the CPU in Triton's interpreter only."""
    if device_type not in ("cuda", "cpu") or not _installed():
        return False
    from pag_fast_kernels import launch

    return launch.supports(device_type, index)


@_constant
def is_measured(device_type: str, index: int | None) -> bool:
    """Whether the kernels have been run and measured on that kind of device."""
    from pag_fast_kernels import launch

    return bool(launch.measured_on(device_type, index))


@_constant
def measured_backend(
    device_type: str,
    index: int | None,
    dtype: str,
    head_dim: int,
    tokens: int,
    rows: int,
    num_attend: int,
    num_context: int,
) -> str | None:
    """What was faster there for such an attention call; ``None`` where nobody measured it."""
    from pag_fast_kernels import launch

    key = launch.call_key(getattr(torch, dtype), head_dim, tokens, rows, num_attend, num_context)
    found = launch.measured_on(device_type, index).get(key)
    return found.backend if found else None


@_constant
def _installed() -> bool:
    return _find_kernels()


@functools.cache
def _find_kernels() -> bool:
    names = ("triton", "pag_fast_kernels")
    if any(importlib.util.find_spec(name) is None for name in names):
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON
