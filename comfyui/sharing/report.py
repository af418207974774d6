"""One line in the log for each reason, and no more."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("pag_fast")


class Report:
    """Says each reason once for the model it belongs to.

    What only prevents sharing costs time, not the picture: it is said in the log, once, and the
    perturbed pass is computed whole.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def whole(self, model: str, reason: str) -> None:
        """Say once that the perturbed pass of ``model`` is computed whole, and why."""
        if reason not in self.said:
            self.said.add(reason)
            LOGGER.warning("pag_fast: %s computes its perturbed pass whole: %s", model, reason)
