"""Every spec: PAG equals a slow PAG, or is refused as its spec says."""

from __future__ import annotations

import pytest

from sweep import specs
from sweep.check import check

CASES = [(spec, case) for spec in specs() for case in spec.cases]


@pytest.mark.parametrize(
    ("spec", "case"), CASES, ids=[f"{s.name}-{'-'.join(map(str, c))}" for s, c in CASES]
)
def test_pipeline(spec, case):
    check(spec, case)
