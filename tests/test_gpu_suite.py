"""The GPU suite without a GPU: how parts, stages and runs end, what they leave, and their clock.

``tests/rehearsal`` runs the stages themselves, on a fake GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from rehearsal import fake_cuda

from benchmarks import gpu_suite, queued
from benchmarks.gpu_suite import archive, run_stage, tree_id
from benchmarks.stages import STAGE_SECONDS, STAGES, Part

ROOT = Path(__file__).parent.parent


def test_stages_fit():
    """Eight minutes each, and one run of all leaves at most eight files."""
    assert STAGE_SECONDS <= 480
    assert len(STAGES) + 1 <= 8
    for parts in STAGES.values():
        assert all(part.last < part.seconds <= STAGE_SECONDS for part in parts)
        # what begins last has time to measure something, even if all before it ran out
        assert sum(part.seconds for part in parts[:-1]) + 60 <= STAGE_SECONDS
    script = (ROOT / "benchmarks" / "gpu_suite.sh").read_text("utf-8")
    assert ", ".join(STAGES) in script


# ---- how parts end ----

FOUND = {"machine": {"chip": "a chip"}, "missing": []}
ROWS = (
    "import json, pathlib, sys, time; "
    "pathlib.Path(sys.argv[1]).write_text(json.dumps({'rows': [{'case': sys.argv[2]}]})); "
)


def _part(name, code, seconds=30.0):
    return Part(name, seconds, (sys.executable, "-c", ROWS + code, "{rows}", name))


@pytest.fixture
def stage(monkeypatch, tmp_path):
    def run(*parts):
        monkeypatch.setitem(STAGES, "some", list(parts))
        report = run_stage("some", FOUND, tmp_path / "work", tmp_path)
        assert json.loads((tmp_path / "some.json").read_text()) == report
        return report

    return run


def test_rows_of_parts_that_failed_are_kept_apart(stage):
    report = stage(
        _part("good", "print('fine')"), _part("bad", "print('why'); sys.exit(3)"), _part("last", "")
    )
    assert [(e["status"], e["code"]) for e in report["parts"]] == [
        ("passed", 0),
        ("failed", 3),
        ("passed", 0),
    ]
    assert report["parts"][1]["tail"] == ["why"]
    assert report["rows"] == [{"case": "good"}, {"case": "last"}]
    assert report["other_rows"] == [{"case": "bad"}]
    assert report["tests"] == "passed"
    assert stage(_part("bad", "sys.exit(1)"))["tests"] == "failed"


def test_words_of_a_command(stage, monkeypatch, tmp_path):
    monkeypatch.setenv("JOBS", "3")
    words = ("{jobs}", "{workers}", "{seconds}", "{folder}/configs")
    part = Part("words", 30.0, (sys.executable, "-c", "import sys; print(sys.argv[1:])", *words))
    (entry,) = stage(part)["parts"]
    assert entry["tail"] == [str(["-n", "3", "3", "15", str(tmp_path / "work" / "configs")])]


def test_a_part_out_of_time_leaves_nobody_behind(stage, tmp_path):
    """Neither the process nor what it has started, and the next one runs."""
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    report = stage(_part("slow", code, 3.0), _part("next", ""))
    assert [entry["status"] for entry in report["parts"]] == ["out of time", "passed"]
    assert report["other_rows"] == [{"case": "slow"}]
    time.sleep(3)
    assert not mark.exists()


def test_a_stage_out_of_time(stage, monkeypatch):
    monkeypatch.setattr(gpu_suite, "STAGE_SECONDS", 1.0)
    report = stage(_part("any", ""))
    assert report["parts"][0]["reason"] == "The time of the stage is over."


def test_who_is_stopped_leaves_the_files(tmp_path):
    """As ``timeout`` stops: parts are ended, what was measured before is there."""
    mark = tmp_path / "two has begun"
    two = f"import time, pathlib; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    code = f"""
import sys
from benchmarks import gpu_suite, stages
stages.STAGES['step'] = [
    stages.Part('one', 30.0, (sys.executable, '-c', {ROWS!r}, '{{rows}}', 'one')),
    stages.Part('two', 60.0, (sys.executable, '-c', {two!r})),
]
gpu_suite.probe_here = lambda: {FOUND!r}
sys.exit(gpu_suite.main(['--out', sys.argv[1], 'step']))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["rows"] == [{"case": "one"}]
    with tarfile.open(tmp_path / "step.tar.gz") as tar:
        assert {"step/one.log", "step/two.log"} <= set(tar.getnames())


def test_unknown_stages(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["check", "nonsense"])
    assert "no stage nonsense: there are check, tune, step" in capsys.readouterr().err


def test_archives_stay_small(tmp_path, monkeypatch):
    """The end of a long log is what says how it ended."""
    monkeypatch.setattr(gpu_suite, "LARGEST_LOG", 1000)
    monkeypatch.setattr(gpu_suite, "LARGEST_ARCHIVE", 2500)
    for name in "abcd":
        (tmp_path / f"{name}.log").write_bytes(b"x" * 5000 + name.encode())
    (tmp_path / "small.json").write_text("{}")
    path = tmp_path / "logs.tar.gz"
    path.write_bytes(archive(tmp_path))
    with tarfile.open(path) as tar:
        sizes = {info.name: info.size for info in tar}
        assert tar.extractfile("a.log").read().endswith(b"xa")
    assert sizes["small.json"] == 2
    assert sorted(sizes.values()) == [2, 1000, 1000]


def test_sources_are_told_without_git(tmp_path):
    for name in ("b.py", "a/c.py", "a.py", "a-b/d.py", "run.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "run.sh").chmod(0o755)
    git = ["git", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run([*git, *command], check=True)
    tree = subprocess.run([*git, "write-tree"], capture_output=True, text=True, check=True).stdout
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / "__pycache__").mkdir()
    assert tree_id(tmp_path) == tree.strip()
    assert re.fullmatch("[0-9a-f]{40}", tree_id(ROOT / "pag_fast"))


# ---- the clock, and the fake ----


@pytest.fixture
def cuda(monkeypatch):
    for name in ("Event", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake_cuda, name))
    monkeypatch.setattr(torch.cuda, "synchronize", fake_cuda._synchronize)
    monkeypatch.setattr(fake_cuda, "slept", [])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **rest: empty(1, **rest))
    return fake_cuda


def test_a_call_is_queued_before_the_gpu_begins(cuda):
    """A sleep that was too short is longer the next time, and stays so."""
    clock = queued.QueuedClock(sleep=1e-3)
    clock(lambda: time.sleep(3e-3))
    assert len(cuda.slept) > 1
    assert all(b == 2 * a for a, b in zip(cuda.slept, cuda.slept[1:], strict=False))
    assert cuda.slept[-1] > 3e-3 * queued.CYCLES
    before = len(cuda.slept)
    clock(lambda: None)
    assert len(cuda.slept) == before + 1


def test_a_call_that_waits_for_the_gpu_is_timed_all_the_same(cuda):
    clock = queued.QueuedClock(sleep=queued.LONGEST / 4)
    assert clock(lambda: torch.cuda.synchronize()) > 0
    assert clock.sleep == queued.LONGEST


def test_the_fake_refuses_what_a_gpu_refuses():
    with fake_cuda.Devices():
        there = torch.randn(4, device="cuda")
        assert (there.device, (there[1:] + 1).device) == (fake_cuda.GPU, fake_cuda.GPU)
        layer = torch.nn.Linear(4, 4).to("cuda")
        assert layer(there).device == layer.weight.data.device == fake_cuda.GPU
        assert there.to("cpu").device.type == there.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 4))
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.randn(4, device="cuda", generator=torch.Generator())
        with torch.device("cuda"), pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(4, generator=torch.Generator())
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
