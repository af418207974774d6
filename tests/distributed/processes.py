"""A few processes that work together on this machine, forked from the tests'."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def run(
    size: int,
    task: Callable[..., Any],
    *args: Any,
    shape: dict[str, int] | None = None,
    timeout: int = 60,
    barrier: bool = True,
) -> list[Any]:
    """What ``task(mesh, *args)`` returns on each of ``size`` ranks.

    Args:
        shape: the mesh's dimensions; one that is called "branch" if omitted.
        barrier: wait for each other at the end, as who goes cannot be talked to any more.
        timeout: seconds after which a rank that waits for another one raises.

    Raises:
        AssertionError: with the traceback of the first rank that raised.
    """
    # forked: what is imported and built stays so, where a new interpreter would need seconds
    shape = shape or {"branch": size}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = [
            context.Process(target=_begin, args=(rank, shape, folder, timeout, barrier, task, args))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    for rank, (worked, value) in enumerate(found):
        assert worked, f"rank {rank}:\n{value}"
    return [value for _, value in found]


def _begin(
    rank: int,
    shape: dict[str, int],
    folder: Path,
    timeout: int,
    barrier: bool,
    task: Any,
    args: Any,
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # diffusers' parallelism asks where the devices of ranks are
    torch.accelerator.device_count = lambda: 1
    store, limit = f"file://{folder}/store", timedelta(seconds=timeout)
    size = math.prod(shape.values())
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    try:
        result = True, task(mesh, *args)
    except BaseException:
        result = False, traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    if barrier:
        dist.barrier()
    dist.destroy_process_group()
