"""Kept outputs that are computed again: whether they still are what the model computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# relative distance from which two computations of one output differ: both run on the same input,
# and rounded otherwise they would differ in the last bit of some elements
_ROUNDING = 1e-5


class SpotChecks:
    """What has been checked in one call: norms that stay on the device until it ends.

    Attributes:
        names: of the modules that were checked.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._norms: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._tolerances: list[float] = []

    def add(self, name: str, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> None:
        """Note how far from the outputs that a module computes ``now`` those are that were kept."""
        norm, wide = torch.linalg.vector_norm, torch.float32
        for old, new in zip(before, now, strict=True):
            if new.is_floating_point():
                self.names.append(name)
                self._norms.append((norm(old, dtype=wide), norm(new - old, dtype=wide)))
                self._tolerances.append(max(torch.finfo(new.dtype).eps / 4, _ROUNDING))

    def differing(self) -> list[str]:
        """Names of the modules that computed something else, and no check is remembered.

        This waits for the device.
        """
        devices = {size.device: [x for x in self._norms if x[0].device == size.device]
                   for size, _ in self._norms}  # fmt: skip
        read = {
            device: iter(torch.stack([x for pair in norms for x in pair]).view(-1, 2).tolist())
            for device, norms in devices.items()
        }
        found = []
        for name, (norm, _), tolerance in zip(
            self.names, self._norms, self._tolerances, strict=True
        ):
            size, distance = next(read[norm.device])
            # what has overflowed tells nothing
            if math.isfinite(size) and not distance <= tolerance * size:
                found.append(name)
        self.names, self._norms, self._tolerances = [], [], []
        return list(dict.fromkeys(found))
