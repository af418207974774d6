"""Runs a function in several processes that can talk to each other, and collects its results."""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240


def on_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, world: int = 2) -> Any:
    """What ``function(*arguments)`` returns on each of ``world`` ranks, as JSON.

    Ranks are forks, which have imported everything already.
    """
    fork = multiprocessing.get_context("fork")
    running = [
        fork.Process(target=_run, args=(folder, rank, world, function, arguments))
        for rank in range(world)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(SECONDS)
    for process in running:
        process.kill()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(world)]
    found = [folder / f"{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in found), "\n".join(log[-3000:] for log in logs)
    return [json.loads(file.read_text()) for file in found]


def _run(folder: Path, rank: int, world: int, function: Callable[..., Any], arguments: Any) -> None:
    with (folder / f"{rank}.log").open("w", buffering=1) as log:
        sys.stdout = sys.stderr = log
        try:
            torch.set_grad_enabled(False)
            # diffusers asks where the devices of ranks are
            torch.accelerator.device_count = lambda: 1
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            found = json.dumps(function(*arguments))
            dist.barrier()
            dist.destroy_process_group()
            (folder / f"{rank}.json").write_text(found)
        except BaseException:
            traceback.print_exc(file=log)
