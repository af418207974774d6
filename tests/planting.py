"""A fault to be planted, and where ``tests/faults.py`` plants it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``path``; ``tests`` are pytest's arguments.

    ``old`` is matched token by token: spaces, line breaks and trailing commas do not count.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """``text`` with the fault in it.

        Raises:
            ValueError: ``old`` is not there exactly once.
        """
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        parts = [(r",?\s*" if token in ")]}" else r"\s*") + re.escape(token) for token in tokens]
        pattern = "".join(parts).removeprefix(r"\s*")
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise ValueError(
                f"Fault {self.name!r}: {self.path} holds {self.old!r} {len(found)} times, not "
                "once: give the fault an anchor that names its place again."
            )
        return text[: found[0].start()] + self.new + text[found[0].end() :]


def tests_of(file: str, select: str = "") -> tuple[str, ...]:
    return (f"tests/test_{file}.py", *(("-k", select) if select else ()))
