"""Which rows a process takes, and on which device, as its launcher says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rows ``index``, ``index + count``, ``index + 2 count``, ... of all."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


def shard_of(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard that ``text`` ("0/4") names, or else the launcher.

    Launchers that are understood: torchrun and accelerate (``RANK``, ``WORLD_SIZE``), SLURM's tasks
    (``SLURM_PROCID``, ``SLURM_NTASKS``), its arrays (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_STEP``,
    ``_COUNT``), and arrays of several tasks.

    Raises:
        ValueError: ``text`` names no shard.
    """
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(
                f"--shard {text!r} is no shard: write its number, from 0, and how many there are: "
                "0/4, 1/4, 2/4, 3/4."
            )
        return Shard(int(match[1]), int(match[2]))
    tasks = _whole(environment, "RANK", "WORLD_SIZE") or _whole(
        environment, "SLURM_PROCID", "SLURM_NTASKS"
    )
    task, per_job = tasks or (0, 1)
    array = _whole(environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    if array is None:
        return Shard(task, per_job)
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    job = (array[0] - first) // int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    return Shard(job * per_job + task, array[1] * per_job)


def local_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this process on its machine, which is the number of its device."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def _whole(environment: Mapping[str, str], index: str, count: str) -> tuple[int, int] | None:
    values = [environment.get(name, "") for name in (index, count)]
    if not all(value.isdigit() for value in values):
        return None
    return int(values[0]), int(values[1])
