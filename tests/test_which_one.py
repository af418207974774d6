"""docs/which_one.md says what is counted."""

from __future__ import annotations

import json

import pytest

from benchmarks.which_one import COUNTS, FAMILIES, NUMBERS, PAGE, counted, page

_NUMBERS = json.loads(NUMBERS.read_text("utf-8"))


def test_the_page_is_up_to_date() -> None:
    text, counts = PAGE.read_text("utf-8"), json.loads(COUNTS.read_text("utf-8"))
    assert text == page(text, _NUMBERS, counts), "run python -m benchmarks.which_one --update"
    assert set(_NUMBERS) == set(FAMILIES)


@pytest.mark.parametrize("name", ["PixArtSigmaPAGPipeline", "Lumina2Pipeline"])
def test_ranks_cost_what_is_committed(name: str) -> None:
    assert counted(name) == _NUMBERS[name]
    whole = json.loads(COUNTS.read_text("utf-8"))["flops"]
    off = next(x for label, x in whole.items() if label.startswith(name) and "CFG off" in label)
    # of two ranks the second runs what one process runs without CFG
    assert _NUMBERS[name]["2"] == off["patched"]
