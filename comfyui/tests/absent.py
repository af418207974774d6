"""Modules that ComfyUI imports and no test needs: torchvision, torchaudio, kornia, spandrel.

The releases of torchvision and torchaudio on PyPI do not load beside a CPU build of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

NAMES = ("torchvision", "torchaudio", "kornia", "spandrel")


class _Absent(ModuleType):
    """Every attribute is a class that can be inherited from and named, and cannot be made."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):  # what inspect and pickle look for has to be missing
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(f"{self.__name__}.{name} is not installed in tests.")

        return type(name, (), {"__new__": refuse, "__module__": self.__name__})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, roots: frozenset[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.roots:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)  # the import system gives it a __path__, as to every package

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    """Let imports of what is not installed succeed, once per process."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    missing = frozenset(name for name in NAMES if find_spec(name) is None)
    sys.meta_path.append(_Finder(missing))
