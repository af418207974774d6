"""``pag-fast generate``: shards, a folder that survives a kill, rows that fail alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pag_fast import cli
from pag_fast.tools.generate import run as generating
from pag_fast.tools.generate.folder import Folder
from pag_fast.tools.generate.rows import Row, batches, read_rows
from pag_fast.tools.generate.shards import Shard, local_index, shard_of

WORDS = ("red apple", "dog", "cat", "green heart", "grinning face", "sun", "umbrella", "fish")
OPTIONS = ["--steps", "2", "--guidance-scale", "2", "--batch", "3"]


def _prompts(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    file = folder / "prompts.jsonl"
    rows = [{"prompt": word} for word in WORDS] if rows is None else rows
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _generate(prompts: Path, out: Path, *options: str) -> int:
    return cli.main(["generate", "--prompts", str(prompts), "--out", str(out), *OPTIONS, *options])


def _pictures(out: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob("*.png"))}


def _differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> int:
    assert one.keys() == other.keys()
    return max(int(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The pictures of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert _generate(_prompts(folder), folder / "out") == 0
    pictures = _pictures(folder / "out")
    assert len(pictures) == len(WORDS)
    return pictures


def _start(prompts: Path, out: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "pag_fast.cli", "generate"]
    command += ["--prompts", str(prompts), "--out", str(out), *OPTIONS[:4], "--batch", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def test_killed_in_the_middle_and_started_again(
    whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    prompts, out = _prompts(tmp_path), tmp_path / "out"
    running = [_start(prompts, out, rank, 2) for rank in range(2)]
    until = time.monotonic() + 300
    while len(list(out.glob("*.png"))) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = _pictures(out)
    assert 0 < len(there) < len(WORDS), "it was not killed in the middle"
    kept = {name: (out / name).stat().st_mtime_ns for name in there}
    running = [_start(prompts, out, rank, 2) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert _differ(_pictures(out), whole) <= 1
    assert {name: (out / name).stat().st_mtime_ns for name in there} == kept
    assert not list(out.glob(".*.part")), "nothing half-written is left"
    assert json.loads((out / "report.1-of-2.json").read_text())["rows"] == len(WORDS) // 2


@pytest.mark.parametrize("count, batch", [(1, 1), (2, 4), (3, 2)])
def test_pictures_depend_on_no_shard_and_no_batch(
    count: int, batch: int, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    prompts, out = _prompts(tmp_path), tmp_path / "out"
    for index in reversed(range(count)):
        options = ["--shard", f"{index}/{count}", "--batch", str(batch)]
        assert _generate(prompts, out, *options) == 0
    assert _differ(_pictures(out), whole) <= 1


def test_a_bad_row_fails_alone_and_is_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "dog", "id": "good"},
        {"prompt": "dog", "id": "bad", "nonsense": 1},
        {"prompt": "dog", "id": "avoiding", "negative_prompt": "red", "seed": 0},
        {"prompt": "dog", "id": "again", "seed": 0},
    ]
    prompts, out = _prompts(tmp_path, rows), tmp_path / "out"
    assert _generate(prompts, out) == 1
    pictures = _pictures(out)
    assert list(pictures) == ["again.png", "avoiding.png", "good.png"]
    assert np.array_equal(pictures["again.png"], pictures["good.png"])
    assert not np.array_equal(pictures["avoiding.png"], pictures["good.png"])
    (failure,) = map(json.loads, (out / "errors.0-of-1.jsonl").read_text().splitlines())
    assert failure["id"] == "bad"
    assert "takes no argument 'nonsense'" in failure["error"]
    # mended, only it is drawn, and the errors are gone
    del rows[1]["nonsense"]
    assert _generate(_prompts(tmp_path, rows), out) == 0
    assert (out / "errors.0-of-1.jsonl").read_text() == ""
    assert json.loads((out / "report.0-of-1.json").read_text())["drawn"] == 1


def test_the_longest_id_and_what_is_said_of_a_row_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "dog", "id": "x" * 251}, {"prompt": "dog", "nonsense": 1}]
    assert _generate(_prompts(tmp_path, rows), tmp_path / "out") == 1
    assert list(_pictures(tmp_path / "out")) == [f"{'x' * 251}.png"]
    said = capsys.readouterr()
    assert "1 drawn, 0 were there, 1 failed" in said.out and "picture" not in said.err


def test_other_settings_and_other_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = _prompts(tmp_path, [{"prompt": "dog", "id": "one"}]), tmp_path / "out"
    assert _generate(prompts, out) == 0
    before = _pictures(out)
    assert _generate(prompts, out, "--pag-scale", "1") == 2
    assert "made with call" in capsys.readouterr().err
    assert _generate(_prompts(tmp_path, [{"prompt": "cat", "id": "one"}]), out) == 2
    assert "of another row" in capsys.readouterr().err
    assert _differ(_pictures(out), before) == 0


def test_out_of_memory_halves_the_batch_and_other_failures_go_row_by_row(tmp_path: Path) -> None:
    sizes: list[int] = []

    def draw(rows: list[Row]) -> list[Image.Image]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(row.prompt == "bad" for row in rows):
            raise RuntimeError("this one")
        return [Image.new("RGB", (2, 2)) for _ in rows]

    rows = [Row(f"{i}", i, "bad" if i == 5 else "good") for i in range(8)]
    folder = Folder(tmp_path, Shard(0, 1))
    failed = generating._draw_all(draw, rows, folder, 8, Shard(0, 1))  # type: ignore[arg-type]
    assert sizes == [8, 4, 2, 2, 4, 2, 1, 1, 2]
    assert failed == [{"id": "5", "error": "RuntimeError: this one"}]
    assert len(list(tmp_path.glob("*.png"))) == 7


@pytest.mark.parametrize(
    "environment, shard, device",
    [
        ({}, (0, 1), None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8), 1),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (2, 4), 0),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4",
          "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4), None),
        ({"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "3",
          "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2",
          "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (5, 6), None),
    ],
)  # fmt: skip
def test_shards_of_launchers(
    environment: dict[str, str], shard: tuple[int, int], device: int | None
) -> None:
    assert shard_of(None, environment) == Shard(*shard)
    assert local_index(environment) == device
    assert shard_of("1/3", environment) == Shard(1, 3)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no shard"):
        shard_of(text, {})


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is no JSON"),
        ('"dog"', "has no prompt"),
        ('{"prompt": 3}', "has no prompt"),
        ('{"prompt": "dog", "id": "../x"}', "cannot be the name of a file"),
        ('{"prompt": "dog", "id": ".x"}', "cannot be the name of a file"),
        ('{"prompt": "dog", "id": true}', "id true cannot be the name of a file"),
        ('{"prompt": "dog", "id": null}', "id null cannot be the name of a file"),
        ('{"prompt": "dog", "id": ""}', "id '' cannot be the name of a file"),
        (f'{{"prompt": "dog", "id": "{"x" * 252}"}}', "use at most 251 letters"),
        ('{"prompt": "dog", "seed": -1}', "seed -1"),
        ('{"prompt": "dog", "seed": 1.5}', "seed 1.5"),
        ('{"prompt": "dog", "negative_prompt": 1}', "negative_prompt 1"),
        ('{"prompt": "dog", "latents": 1}', "latents is set"),
        ('{"prompt": "dog", "id": "A"}\n{"prompt": "dog", "id": "a"}', "two rows with the id"),
        ("", "has no rows"),
    ],
)
def test_rows_that_are_none(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_rows(file, 0)


def test_rows_of_equal_arguments_share_a_batch() -> None:
    rows = [Row(str(i), i, "dog", call={} if i < 5 else {"pag_scale": 1.0}) for i in range(7)]
    assert [len(batch) for batch in batches(rows, 3)] == [3, 2, 2]


def test_parts_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path, Shard(0, 1))
    mine = folder._part("a")
    mine.write_text("half")
    dead = mine.with_name(mine.name.replace(str(os.getpid()), "999999999"))
    dead.write_text("half")
    folder.sweep()
    assert mine.exists()
    assert not dead.exists()
