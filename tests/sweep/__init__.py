"""Pipelines of diffusers that nobody has described: built tiny, compared with a slow PAG.

Run by ``make sweep``. A pipeline is a :class:`sweep.spec.Spec` in a file of its family. What became
of each is recorded in ``results.json``, of which ``sweep/page.py`` makes ``docs/pipelines.md``.
"""

from __future__ import annotations

from typing import Any

import tiny_hosts  # noqa: F401  it takes specs over from here, and has to come first

FAMILIES = (
    "images",
    "single_images",
    "more_images",
    "videos",
    "more_videos",
    "unets",
    "more_unets",
    "others",
    "conditioned",
)


def specs() -> list[Any]:
    """All specs whose pipeline this diffusers has, and nobody has described."""
    from importlib import import_module

    import pag_fast

    every = [spec for name in FAMILIES for spec in import_module(f"sweep.{name}").SPECS]
    described = pag_fast.supported_pipelines()
    return [spec for spec in every if spec.exists and spec.name not in described]
