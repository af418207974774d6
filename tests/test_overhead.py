"""What patching costs in Python is counted, not timed: calls per step against a committed table."""

from __future__ import annotations

import json

import pytest
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from benchmarks.overhead import MOST, TABLE, added, collect, events
from benchmarks.overhead import PIPELINES as COUNTED

BEFORE = json.loads(TABLE.read_text("utf-8"))


@pytest.mark.parametrize("name", COUNTED)
def test_a_patched_step_makes_no_more_calls_than_it_did(name):
    """Calls and C calls per step, patched minus stock, against the committed table."""
    found = collect([name])[name]
    assert found["patched"] != found["stock"], "nothing was patched"
    assert added(found) <= added(BEFORE[name]), f"{found}, was {BEFORE[name]}"
    assert added(found) <= MOST[name]


def test_every_call_is_counted():
    def once():
        return len("a") + abs(-1)

    assert events(once) - events(lambda: None) == 2
    assert events(lambda: [once() for _ in range(5)]) > 15


def test_what_is_counted_is_pag():
    name = COUNTED[0]
    assert name in PIPELINES
    pipe = build(name)
    stock = latents(pipe, call_kwargs(name, pipe))
    with pag_fast.patched(pipe):
        assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
