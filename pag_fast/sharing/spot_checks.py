"""Kept outputs that are computed again: whether they still are what the model computes."""

from __future__ import annotations

import math

import torch

_norm = torch.linalg.vector_norm
# relative distance from which two computations of one output differ: both run on the same input,
# and rounded otherwise they would differ in the last bit of some elements
_TOLERANCES = {
    dtype: max(torch.finfo(dtype).eps / 4, 1e-5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class SpotChecks:
    """What has been checked in one call: norms that stay on the device until it ends."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, float, torch.Tensor, torch.Tensor]] = []

    def add(self, name: str, kept: torch.Tensor, now: torch.Tensor) -> None:
        """Note how far from the output that a module computes now the one is that was kept."""
        if now.dtype in _TOLERANCES:
            wide = torch.promote_types(now.dtype, torch.float32)
            size, distance = _norm(kept, dtype=wide), _norm(now - kept, dtype=wide)
            self._noted.append((name, _TOLERANCES[now.dtype], size, distance))

    def differing(self) -> list[str]:
        """Names of the modules that have computed something else; all checks are forgotten.

        This waits for the device.
        """
        noted, self._noted = self._noted, []
        devices = dict.fromkeys(size.device for *_, size, _ in noted)
        names = []
        for device in devices:
            checks = [check for check in noted if check[2].device == device]
            numbers = torch.stack([x for *_, size, distance in checks for x in (size, distance)])
            values = numbers.view(-1, 2).tolist()
            for (name, tolerance, *_), (size, distance) in zip(checks, values, strict=True):
                # what has overflowed tells nothing
                if math.isfinite(size) and not distance <= tolerance * size:
                    names.append(name)
        return list(dict.fromkeys(names))
