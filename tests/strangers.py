"""Tiny models for the tests of compatibility, somebody else's wrapper, and what is found there."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import tiny_hosts
import torch
from torch import nn

from pag_fast.runtime.compatibility import Answer, look

WEIGHTS = Answer.WEIGHTS_APART | Answer.NOTHING_KEPT
CACHE = Answer.UNSHARED | Answer.KEEP_ROWS | Answer.MAY_SKIP


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def unet() -> Any:
    return tiny.unet().eval()


def flux() -> Any:
    return tiny_hosts.flux().eval()


def answers_of(model: nn.Module, **options: Any) -> dict[str, Answer]:
    return {finding.what: finding.answer for finding in look(model, **options)}


def wrap(module: nn.Module) -> None:
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
