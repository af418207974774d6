"""What is put on a model for one forward: a list made once, set and taken back in one loop each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..sharing.replacement import MISSING, Replacement

Entry = tuple[dict[str, Any], str, Any]
"""The ``__dict__`` of an instance, an attribute, and what stands there for one forward."""


class InstancePatch:
    """Attributes of module instances that have other values while one forward runs.

    The values are the same objects in every forward: compiled graphs guard on them, where they
    would not guard on hooks. Dictionaries are written directly, because ``nn.Module.__setattr__``
    costs ten times as much and a model has hundreds of entries.

    Args:
        entries: of two for the same attribute the first counts.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        found: dict[tuple[int, str], Entry] = {}
        for entry in entries:
            found.setdefault((id(entry[0]), entry[1]), entry)
        self.entries = list(found.values())

    @classmethod
    def nothing(cls) -> InstancePatch:
        """No changes: the model is held for one forward as it is."""
        return cls(())

    def on(self) -> list[Any]:
        """Set every attribute; returns what :meth:`off` needs."""
        before: list[Any] = []
        for own, name, value in self.entries:
            old = own.get(name, MISSING)
            if old is value:
                # somebody has put back what he had captured in the middle of an earlier forward
                old = value.came_back() if isinstance(value, Replacement) else value
            elif isinstance(value, Replacement):
                value.displace(old)
            before.append(old)
            own[name] = value
        return before

    def off(self, before: list[Any]) -> None:
        """Put everything back; what somebody else has set meanwhile stays."""
        for (own, name, value), old in zip(self.entries, before, strict=True):
            if own.get(name, MISSING) is not value:
                continue
            if old is MISSING:
                del own[name]
            else:
                own[name] = old


@contextmanager
def as_put_on(patch: InstancePatch) -> Iterator[None]:
    """With ``patch`` on, for a look at the model as its forward will find it."""
    before = patch.on()
    try:
        yield
    finally:
        patch.off(before)
