"""What an older diffusers cannot run: such tests are skipped there, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

import pag_fast
from pag_fast.models import registry as models
from pag_fast.pipelines.registry import PIPELINES

VERSION = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
OLD = VERSION < (0, 36)
# of 0.35: what tests call these with is refused, or ignored
BROKEN = {
    "WanVACEPipeline": "takes one prompt and no list",
    "FluxControlNetPipeline": "guides where the negative prompt is in words, and not embedded",
    "FluxImg2ImgPipeline": "guides where the negative prompt is in words, and not embedded",
    "FluxInpaintPipeline": "guides where the negative prompt is in words, and not embedded",
}
GROUP_OFFLOADING = "its group offloading wants an accelerator"


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SAME_NOISE = pytest.mark.skipif(
    TORCH < (2, 7), reason="until torch 2.6 the noise of a seed is another one in bf16"
)


TRACES = pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 traces no indexing by masks")


def newest(reason: str) -> Any:
    """A mark: the test needs a newer diffusers, as ``reason`` says."""
    return pytest.mark.skipif(OLD, reason=f"diffusers {diffusers.__version__}: {reason}")


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _words(part)


def lacking(parameters: dict[str, Any]) -> str:
    """Why a test with these parameters cannot run with this diffusers; empty: it can."""
    described = {entry.name for entry in PIPELINES}
    classes = {entry.name for entry in (*models.DESCRIPTIONS, *models.CONTROLNETS)}
    for text in _words(list(parameters.values())):
        word = text.partition("-")[0]  # a card may be of one of several sizes
        if word in BROKEN:
            return f"{word} {BROKEN[word]}"
        if word in described and word not in pag_fast.supported_pipelines():
            return f"{word} is newer, or another one"
        if (word in classes or word.endswith("Pipeline")) and not hasattr(diffusers, word):
            return f"there is no {word}"
    return ""


def skip_what_is_lacking(items: list[pytest.Item]) -> None:
    """Mark the tests of an older diffusers that it cannot run."""
    for item in items if OLD else ():
        reason = lacking(getattr(getattr(item, "callspec", None), "params", {}))
        if reason:
            item.add_marker(newest(reason))
