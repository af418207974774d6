"""The examples of many prompts: every launcher draws the same pictures, in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pag_fast
from pag_fast.tools.load import emoji

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "many_prompts"
PROMPTS = EXAMPLES / "prompts.jsonl"
NAMES = ["000000.png", "000001.png", "000003.png", "dog.png"]


def _run(*command: str | Path, **variables: str) -> str:
    # the interpreter's own folder has torchrun, accelerate and pag-fast
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **variables, "PATH": path}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """The pictures of one process, drawn one by one."""
    pipe = pag_fast.patch(emoji())
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for number, line in enumerate(PROMPTS.read_text("utf-8").splitlines()):
        call = json.loads(line)
        name = call.pop("id", f"{number:06}")
        generator = torch.Generator().manual_seed(call.pop("seed", number))
        picture = pipe(**call, num_inference_steps=2, generator=generator).images[0]
        found[f"{name}.png"] = np.asarray(picture).astype(int)
    return found


def _check(out: Path, alone: dict[str, np.ndarray]) -> None:
    assert [path.name for path in sorted(out.glob("*.png"))] == NAMES == sorted(alone)
    for name, wanted in alone.items():
        found = np.asarray(Image.open(out / name)).astype(int)
        assert np.abs(found - wanted).max() <= 1, name


def test_torchrun(tmp_path: Path) -> None:
    _run(EXAMPLES / "torchrun.sh", tmp_path, "2")
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == NAMES
    reports = [json.loads((tmp_path / f"report.{i}-of-2.json").read_text()) for i in range(2)]
    assert [report["drawn"] for report in reports] == [2, 2]


def test_an_array_of_jobs(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}
    _run("bash", EXAMPLES / "slurm_array.sbatch", PROMPTS, tmp_path, **array)
    assert [path.name for path in tmp_path.glob("*.png")] == ["000003.png"]


def test_accelerate(tmp_path: Path, alone: dict[str, np.ndarray]) -> None:
    script = EXAMPLES / "with_accelerate.py"
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "2"]
    _run(*launch, script, tmp_path, "--steps", "2")
    _check(tmp_path, alone)


def test_ray(tmp_path: Path, alone: dict[str, np.ndarray]) -> None:
    """A patched pipeline travels to real actors, and shares branches there."""
    pytest.importorskip("ray.data")
    script = EXAMPLES / "with_ray.py"
    said = _run(
        *(sys.executable, script, tmp_path, "--steps", "2", "--actors", "2"),
        RAY_USAGE_STATS_ENABLED="0",
    )
    _check(tmp_path, alone)
    drawn = [line for line in said.splitlines() if ".png, steps:" in line]
    assert len(drawn) == len(NAMES) and all("{'shared': " in line for line in drawn), said
