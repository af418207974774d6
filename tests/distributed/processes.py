"""Runs a function in several processes that can talk to each other, and collects its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_RUN = """
import sys
sys.path[:0] = {path!r}
import json, os, torch
import torch.distributed as dist
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.accelerator.device_count = lambda: 1  # diffusers asks where the ranks' devices are
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=world)
import {module}
found = {module}.{function}(*{arguments!r})
with open("{folder}/" + str(rank) + ".json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


def on_ranks(folder: Path, module: str, function: str, *arguments: Any, world: int = 2) -> Any:
    """What ``module.function(*arguments)`` returns on each of ``world`` ranks, as JSON."""
    path = [str(Path(__file__).parent), *(x for x in sys.path if x)]
    source = _RUN.format(
        path=path, folder=folder, module=module, function=function, arguments=arguments
    )
    running = []
    for rank in range(world):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-c", source]
        log = (folder / f"{rank}.log").open("w")
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        for process in running:
            process.wait(timeout=240)
    finally:
        for process in running:
            process.kill()
    for rank, process in enumerate(running):
        assert not process.returncode, (folder / f"{rank}.log").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
