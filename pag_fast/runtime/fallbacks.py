"""What every kind of patch does when a call cannot run as it should."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from ..config import PatchConfig


class Falls:
    """Counts steps and fallbacks, and refuses a call that begins while another one runs.

    Attributes:
        session: the running call, if any.
        steps: denoiser calls so far, by how they ran.
        fallbacks: reasons why something ran otherwise than it should, and how often.
    """

    def __init__(self, config: PatchConfig) -> None:
        self.config = config
        self.session: Any = None
        self.steps: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def check_idle(self) -> None:
        """Raises ValueError while a call runs."""
        if self.session is not None:
            raise ValueError(
                "This pipeline is already running: a patched pipeline cannot be called from its "
                "own callback or from a second thread."
            )

    def fall_back(self, reason: str) -> None:
        """Count a fallback; warn the first time, raise if strict."""
        if self.config.strict:
            raise ValueError(f"{reason} (strict=True)")
        if reason not in self.fallbacks:
            warnings.warn(f"pag_fast: {reason}", stacklevel=2)
        self.fallbacks[reason] += 1
