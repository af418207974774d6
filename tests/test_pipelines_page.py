"""docs/pipelines.md says what the specs say, and that most of diffusers' pipelines are taken."""

from __future__ import annotations

import json
from collections import Counter

import diffusers
import pytest
from sweep import specs
from sweep.page import PAGE, RESULTS, TAKEN, classes, page, state_of

import pag_fast

_RESULTS = json.loads(RESULTS.read_text())
pytestmark = pytest.mark.skipif(
    diffusers.__version__ != _RESULTS["diffusers"], reason="the page is of another diffusers"
)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(_RESULTS), "run make page"


def test_what_is_recorded_is_what_the_specs_say():
    recorded = _RESULTS["pipelines"]
    described = {name for name, row in recorded.items() if row["state"] == "described"}
    assert described == set(pag_fast.supported_pipelines())
    tried = {spec.name: spec for spec in specs()}
    assert set(recorded) == described | set(tried) and not described & set(tried)
    for name, spec in tried.items():
        every = spec.refused and all(spec.refuses(*case[:2]) for case in spec.cases)
        assert (recorded[name]["state"] == "refused") == bool(every), name


def test_most_pipelines_are_taken():
    states = Counter(state_of(name, _RESULTS["pipelines"])["state"] for name in classes())
    assert sum(states[state] for state in TAKEN) >= 150
