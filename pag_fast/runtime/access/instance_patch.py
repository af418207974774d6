"""What is put on a model for one forward: a list made once, set and taken back in one loop each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from ...sharing.replacement import MISSING, Replacement

_forward = attrgetter("forward")

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
        # the third says whether the object has to know what it takes the place of
        self._entries = [(*entry, isinstance(entry[2], Replacement)) for entry in self.entries]
        self._replacements = [value for _, _, value, knows in self._entries if knows]
        self._classes: list[Any] = list({type(x.module): None for x in self._replacements})
        self._forwards: list[Any] = []
        self._rebound = 0

    @classmethod
    def nothing(cls) -> InstancePatch:
        """No changes: the model is held for one forward as it is."""
        return _NOTHING

    def on(self) -> list[Any]:
        """Set every attribute; returns what :meth:`off` needs."""
        forwards = list(map(_forward, self._classes))
        # another patch with some of these objects may have run since
        if forwards != self._forwards or self._rebound != Replacement.rebound:
            for replacement in self._replacements:
                replacement.rebind()
            self._forwards, self._rebound = forwards, Replacement.rebound
        before: list[Any] = [MISSING] * len(self._entries)
        index = 0
        # operators, as a call for each of hundreds of entries would show in every forward
        for own, name, value, knows in self._entries:
            old = own[name] if name in own else MISSING  # noqa: SIM401
            if old is value:
                # somebody has put back what he had captured in the middle of an earlier forward
                old = came_back(value)
            elif knows and old is not value.displaced:
                value.displace(old)
            before[index] = old
            own[name] = value
            index += 1  # noqa: SIM113
        return before

    def off(self, before: list[Any]) -> None:
        """Put everything back; what somebody else has set meanwhile stays."""
        index = 0
        for own, name, value, _ in self._entries:
            old = before[index]
            index += 1
            if name not in own or own[name] is not value:
                continue
            if old is MISSING:
                del own[name]
            else:
                own[name] = old


_NOTHING = InstancePatch(())


def came_back(value: Any) -> Any:
    """What belongs in the place of an object of ours that somebody has put back for good."""
    if isinstance(value, Replacement):
        return value.came_back()
    return getattr(value, "displaced", value)


@contextmanager
def as_put_on(patch: InstancePatch) -> Iterator[None]:
    """With ``patch`` on, for a look at the model as its forward will find it."""
    before = patch.on()
    try:
        yield
    finally:
        patch.off(before)
