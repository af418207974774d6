"""What pag_fast runs on: for ``pag-fast env``, and for bug reports."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from ..analysis.verify import versions


def environment() -> list[str]:
    """Lines that tell what pag_fast runs on."""
    lines = [f"{package} {version}" for package, version in versions().items()]
    lines[1] += f" {platform.platform()}"
    lines.append(f"kernels {'installed' if _has_kernels() else 'not installed'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(f"device {index}: {properties.name}, {memory:.0f} GiB")
    else:
        lines.append(f"device: CPU, {torch.get_num_threads()} threads")
    return lines


def _has_kernels() -> bool:
    return importlib.util.find_spec("pag_fast_kernels") is not None
