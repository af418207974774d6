"""The gate proves itself: what is planted is caught, and what proves nothing is refused."""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from dataclasses import replace

import pytest
import torch
from shallow import build
from tiny import call_kwargs

from benchmarks import counts
from benchmarks.compare import main
from pag_fast.analysis.published import CARDS, ModelCard
from pag_fast.processors import PerturbedSelfAttention
from pag_fast.tools.bench.record import Results, read_json, write
from pag_fast.tools.bench.timing import interleave, make_rows
from pag_fast.tools.bench.variants import variants

MACHINE = {"chip": "a chip", "torch": "2.13.0"}
SAMPLES = {"no PAG": [2.0, 2.1, 2.0], "stock": [3.0, 3.2, 3.0], "patched": [2.5, 2.6, 2.5]}


def _rows(samples=SAMPLES, case="a case"):
    return make_rows(samples, suite="step", case=case, settings={}, dtype="float32")


def _scaled(factors):
    return {name: [factors.get(name, 1) * x for x in xs] for name, xs in SAMPLES.items()}


@pytest.fixture
def compare(tmp_path, capsys):
    """Exit status and output of the command on two results, two reports, or two files."""

    def run(old, new, *options):
        paths = []
        for index, what in enumerate((old, new)):
            path = tmp_path / f"{index}.json"
            if isinstance(what, Results):
                write(what, path)
            else:
                path.write_text(json.dumps(what))
            paths.append(str(path))
        status = main([*paths, *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def _passed(rows, **machine):
    return Results({**MACHINE, **machine}, rows, "passed")


def test_equal_files_pass(compare):
    status, text = compare(_passed(_rows()), _passed(_rows()))
    assert status == 0
    assert "0 worse, 0 better, 0 missing" in text
    assert "step: a case, float32, patched / stock" in text
    assert "1.200 (1.200 to 1.2" in text


@pytest.mark.parametrize(
    ("factors", "status", "word"),
    [
        ({"patched": 1.1}, 1, "REGRESSION: step: a case, float32, patched / stock: 1.200"),
        ({"patched": 1.03}, 0, "0 worse, 0 better"),
        ({"patched": 0.9}, 0, "improved: step: a case, float32, patched / no PAG: 0.800"),
        # a slower machine, not a slower patch; times of different runs never meet
        ({"patched": 2.0, "stock": 2.0, "no PAG": 2.0}, 0, "0 worse, 0 better"),
        ({"stock": 0.9}, 1, "1 worse, 0 better"),
        ({"patched": float("nan")}, 1, "2 worse"),
    ],
)
def test_thresholds(compare, factors, status, word):
    found, text = compare(_passed(_rows()), _passed(_rows(_scaled(factors))), "--threshold", "5%")
    assert found == status
    assert word in text


def test_the_threshold_is_what_is_asked_for(compare):
    new = _passed(_rows(_scaled({"patched": 1.1})))
    assert compare(_passed(_rows()), new, "--threshold", "0.08")[0] == 1
    assert compare(_passed(_rows()), new, "--threshold", "10%")[0] == 0
    with pytest.raises(SystemExit):
        compare(_passed(_rows()), new, "--threshold", "a lot")


def test_missing_case(compare):
    both = _passed(_rows() + _rows(case="another"))
    status, text = compare(both, _passed(_rows()))
    assert status == 1
    assert "MISSING: step: another, float32, patched / stock is in the old file alone" in text
    assert compare(_passed(_rows()), both)[0] == 0


@pytest.mark.parametrize("outcome", ["failed", "not run"])
@pytest.mark.parametrize("which", [0, 1])
def test_red_tests_are_refused(compare, outcome, which):
    files = [_passed(_rows()), _passed(_rows())]
    files[which] = replace(files[which], tests=outcome)
    status, text = compare(*files)
    assert status == 2
    assert f"The tests of {which}.json are {outcome!r}" in text


def test_other_refusals(compare):
    fine = _passed(_rows())
    other = _passed(_rows(), chip="another chip")
    status, text = compare(fine, other)
    assert status == 2
    assert "--any-chip" in text
    status, text = compare(fine, other, "--any-chip")
    assert status == 0
    assert "note: chip was a chip, is another chip" in text
    assert compare(fine, _passed(_rows(case="another")))[0] == 2
    for strange in ({"schema": 9, "rows": []}, {"schema": 1}, [1], {"flops": {}, "launches": {}}):
        assert compare(fine, strange)[0] == 2


def test_a_planted_slowdown_is_caught(compare):
    """A patched pipeline whose denoiser waits for a tenth of its time; the same without passes.

    All of it in one run and in turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = _sample_a_slowdown()
    finally:
        torch.set_num_threads(before)
    old = {name: samples[name] for name in ("stock", "patched")}
    same = {"stock": samples["stock"], "patched": samples["again"]}
    slow = {"stock": samples["stock"], "patched": samples["slow"]}
    status, text = compare(_passed(_rows(old)), _passed(_rows(same)))
    assert status == 0, text
    status, text = compare(_passed(_rows(old)), _passed(_rows(slow)))
    print(text)
    assert status == 1, text


def _cpu_seconds(call, device):
    """Processor time: what else the machine runs meanwhile must not decide this test."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _sample_a_slowdown():
    pipe = build("StableDiffusionPAGPipeline")
    call = call_kwargs("StableDiffusionPAGPipeline", pipe, steps=1)
    del call["generator"]
    call["latents"] = torch.randn(1, 4, 8, 8)
    ways = variants(pipe)

    def patched():
        ways["patched"](**call)

    patched()
    wait = 0.1 * statistics.median(_cpu_seconds(patched, "cpu") for _ in range(9))

    def spin(*_):
        until = time.thread_time() + wait
        while time.thread_time() < until:
            pass

    def slow():
        handle = pipe.unet.register_forward_hook(spin)
        try:
            patched()
        finally:
            handle.remove()

    calls = {
        "stock": lambda: ways["stock"](**call),
        "patched": patched,
        "again": patched,
        "slow": slow,
    }
    return interleave(calls, 60, warmup=2, clock=_cpu_seconds)


@pytest.fixture
def count_small(monkeypatch):
    """Counts of Stable Diffusion 1.5's card in miniature, which take no time."""
    name = "StableDiffusionPAGPipeline"
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    card = ModelCard(name, "small", "UNet2DConditionModel", config, ("mid",), 64, 64)
    monkeypatch.setitem(CARDS, name, card)
    return functools.partial(counts.collect, [name], progress=False)


@pytest.fixture
def counted_before(count_small):
    """What ``count_small`` has counted once, before anything is planted."""
    if not _BEFORE:
        _BEFORE.update(count_small())
    return copy.deepcopy(_BEFORE)


_BEFORE: dict = {}


def _plant(monkeypatch, extra):
    """Have our attention processor do something more."""
    real = PerturbedSelfAttention.__call__

    def call(self, attn, hidden_states, *args, **kwargs):
        extra(hidden_states)
        return real(self, attn, hidden_states, *args, **kwargs)

    monkeypatch.setattr(PerturbedSelfAttention, "__call__", call)


def test_equal_counts_pass(compare, count_small, counted_before):
    found = count_small()
    assert [len(found[kind]) for kind in counts.COUNTED] == [2, 2, 2]
    status, text = compare(counted_before, found)
    assert (status, text.splitlines()[0]) == (0, "6 counts")


def test_a_planted_launch_is_caught(compare, count_small, counted_before, monkeypatch):
    _plant(monkeypatch, torch.abs)
    status, text = compare(counted_before, count_small())
    assert status == 1
    assert "REGRESSION: launches: StableDiffusionPAGPipeline mid:" in text
    assert ", +1\n" in text
    assert "REGRESSION: flops" not in text


def test_a_planted_flop_is_caught(compare, count_small, counted_before, monkeypatch):
    _plant(monkeypatch, lambda x: x[0, :1, :1] @ x[0, :1, :1])
    status, text = compare(counted_before, count_small())
    assert status == 1
    # one multiplication and one addition
    assert "REGRESSION: flops: StableDiffusionPAGPipeline mid:" in text
    assert ", +2\n" in text


def test_counts_improve_and_go_missing(compare, counted_before):
    before = counted_before
    label = "StableDiffusionPAGPipeline mid"
    after = copy.deepcopy(before)
    after["launches"][label]["patched"] -= 1
    status, text = compare(before, after)
    assert status == 0
    assert "improved: launches: StableDiffusionPAGPipeline mid" in text
    del after["flops"][label]
    status, text = compare(before, after)
    assert status == 1
    assert f"MISSING: flops: {label}" in text


def test_more_registers_are_caught(compare):
    table = {"triton": "1", "binaries": {"kernel 90": {"reg": 100, "stack": 0, "mma.sync": 8}}}
    more = copy.deepcopy(table)
    more["binaries"]["kernel 90"]["stack"] = 16
    assert compare(table, table)[0] == 0
    status, text = compare(table, more)
    assert status == 1
    assert "kernel 90, stack: 0 became 16, +16" in text


def test_the_committed_counts(tmp_path):
    """Every line of the ledger is there; ``test_ledger.py`` counts one of them anew."""
    report = read_json(counts.TABLE)
    assert len(report["flops"]) == sum(len(card.guidance) for card in CARDS.values())
    assert len(report["launches"]) == len(report["bytes"]) == 2 * len(counts.LAUNCHES)
    path = tmp_path / "again.json"
    counts.write_counts(report, path)
    assert path.read_text() == counts.TABLE.read_text()
