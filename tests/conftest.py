"""Shared fixtures: a fixed seed, one thread, and poisoned memory for op tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# before anything imports triton, or kernels are compiled instead of interpreted
os.environ.setdefault("TRITON_INTERPRET", "1")

import diffusers
import older
import pytest
import shortcuts
import torch

from pag_fast.ops import backend
from pag_fast.runtime.access.entry import Entry

# an older Triton has no interpreter that works with today's NumPy, and runs no kernel of ours
collect_ignore_glob: list[str] = []
if not backend._installed():
    collect_ignore_glob += ["test_kernel_*.py", "test_tune.py", "test_bench_ops.py"]
    collect_ignore_glob += ["test_aot.py", "test_hub_kernel.py", "test_op_*.py", "test_bound.py"]

if older.OLD:  # without LTX-2
    collect_ignore_glob += ["test_stock_guidance*.py"]

diffusers.logging.set_verbosity_error()
# fp32 means fp32: cuDNN's convolutions would round to TF32, and results differ by 1e-3
torch.backends.cudnn.allow_tf32 = False
# oneDNN sets up every convolution anew, which takes three times as long as a tiny one itself
torch._C._set_mkldnn_enabled(False)
# benchmarks/gpu_suite.sh runs the tests of the kernels on a GPU, compiled
if "PAG_FAST_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["PAG_FAST_TEST_DEVICE"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    older.skip_what_is_lacking(items)


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage, many while Dynamo traces, skip it."""
    shortcuts.take()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_sessionfinish() -> None:
    """What is alive at the end needs no looking through, which pytest does five times."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tiny models are slower on several threads, and sums stay in one order
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """The first Accelerator of a process decides on the precision of all that follow."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def snapshot() -> Callable[[Any], dict[Any, Any]]:
    """A function that lists everything about a pipeline that a patch could leave behind."""

    def take(pipe: Any) -> dict[Any, Any]:
        # a call sets attributes such as _guidance_scale itself; they are not ours to undo
        seen: dict[Any, Any] = {"class": type(pipe)}
        seen["layers"] = getattr(pipe, "pag_applied_layers", None)
        seen["attributes"] = {k for k in vars(pipe) if "pag_fast" in k or callable(vars(pipe)[k])}
        seen["pair"] = getattr(pipe, "_pag_attn_processors", None)
        for part, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                for name, module in component.named_modules():
                    names, call = set(vars(module)), module._compiled_call_impl
                    if isinstance(call, Entry) and hasattr(pipe, "_pag_fast"):
                        # it stands in front of the model from patch to unpatch
                        call = call.displaced
                        names -= {"_compiled_call_impl"} if call is None else set()
                        names -= {"set_attn_processor"}
                    seen[part, name] = (
                        type(module),
                        names,
                        vars(module).get("forward"),
                        getattr(module, "processor", None),
                        tuple(module._forward_pre_hooks.values()),
                        tuple(module._forward_hooks.values()),
                        call,
                    )
        return seen

    return take


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised floating-point allocation is full of NaN: unwritten output shows."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
