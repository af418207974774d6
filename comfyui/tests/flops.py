"""FLOPs of whatever runs, with PyTorch's attention on the CPU.

Not a part of ``tiny``, which the server imports: nothing of the project is importable there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.utils import flop_counter

from pag_fast.analysis.counter import FlopCounter


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))


class Flops(FlopCounter):
    """Counts FLOPs: ``with Flops() as a: sample(…)``, then ``a.total``, or ``a / b`` of two."""

    formulas: ClassVar[dict[Any, Any]] = {
        **FlopCounter.formulas,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    }

    def __truediv__(self, other: Flops) -> float:
        return self.total / other.total
