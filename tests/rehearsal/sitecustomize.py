"""Python imports this at its start where the folder is on PYTHONPATH: the GPU becomes a fake one.

Whoever loses that PYTHONPATH on the way has no GPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


def _torch(module: Any) -> None:
    import fake_cuda

    fake_cuda.install()


def _launch(module: Any) -> None:
    import fake_cuda

    fake_cuda.install_kernels(module)


def _sizes(module: Any) -> None:
    import tiny_sizes

    getattr(tiny_sizes, module.__name__.partition(".")[2])(module)


def _capture(module: Any) -> None:
    """What is recorded by dispatch is played back, in place of CUDA's graphs."""
    import torch
    from recorded import RecordingCapture

    class Capture(RecordingCapture):
        def __call__(self, run: Any) -> Any:
            replay, out = super().__call__(run)

            def replayed() -> None:
                # what ops make inside of themselves has no device on its own
                with torch._C.DisableTorchFunction():
                    replay()

            return replayed, out

    module.CudaCapture = Capture


AFTER = {
    "torch": _torch,
    "pag_fast_kernels.launch": _launch,
    "pag_fast.runtime.compiled.capture": _capture,
    "benchmarks.cases": _sizes,
    "benchmarks.tiles": _sizes,
    "benchmarks.queued": _sizes,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: Any) -> None:
                execute(module)
                AFTER[name](module)

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
