"""The notebook runs on a CPU, and shows what it is stored with."""

from __future__ import annotations

import base64
import io
import time

import feature_table
import notebooks
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def _with_onednn():
    """Which the other tests are sooner done without: these convolutions are large enough."""
    torch._C._set_mkldnn_enabled(True)
    yield
    torch._C._set_mkldnn_enabled(False)


def _texts(outputs):
    return ["".join(o["text"]) for cell in outputs for o in cell if "text" in o]


def _pictures(outputs):
    shown = [o["data"]["image/png"] for cell in outputs for o in cell if "data" in o]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))), float) for png in shown]


def test_the_notebook_shows_what_it_is_stored_with():
    notebook = notebooks.load()
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    begun = time.process_time()
    outputs = notebooks.run(notebook)
    assert time.process_time() - begun < 60
    assert len(_pictures(stored)) == 3
    for shown, kept in zip(_pictures(outputs), _pictures(stored), strict=True):
        assert shown.shape == kept.shape
        assert ((shown - kept) ** 2).mean() < 1.0, "run make notebook"  # 48 dB
    assert len(_texts(stored)) == 3
    if feature_table.known():
        assert _texts(outputs) == _texts(stored), "run make notebook"


def test_a_cell_shows_what_it_prints_and_its_last_value():
    cells = [{"cell_type": "code", "source": ["a = 2\n", "print(a)\n", "a + 1"]}]
    cells += [{"cell_type": "markdown", "source": ["text"]}, {"cell_type": "code", "source": ["b"]}]
    ((printed, value),) = notebooks.run({"cells": cells[:2]})
    assert printed["text"] == ["2\n"] and value["data"]["text/plain"] == ["3"]
    with pytest.raises(NameError):
        notebooks.run({"cells": cells})
