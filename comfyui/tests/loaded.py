"""Importing this module puts the real engine on ``sys.path``, on the CPU and with SDPA.

Every module of the tests that imports ``comfy`` imports this one first: ComfyUI reads its command
line when it is imported.
"""

from __future__ import annotations

import logging
import sys

import absent
import engine
import torch

VERSION = engine.wanted()
ROOT = engine.fetch(VERSION)
# PyTorch's attention: one op whose FLOPs are known (flops.Flops)
ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention")


def _load() -> None:
    absent.stand_in()
    if str(ROOT) not in sys.path:
        # in front: "utils", "nodes" and "server" are the engine's
        sys.path.insert(0, str(ROOT))
    import comfy.options

    kept = sys.argv
    sys.argv = [kept[0], *ARGUMENTS]
    try:
        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = kept
    import comfy.model_management

    logging.getLogger().setLevel(logging.WARNING)


def at_least(version: str) -> bool:
    """Whether the loaded engine is ``version`` or newer."""
    return _numbers(VERSION) >= _numbers(version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


_load()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
