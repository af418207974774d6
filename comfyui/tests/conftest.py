"""Loads the engine before any test module imports it; the server, started where a test asks."""

from __future__ import annotations

from collections.abc import Iterator

import headless
import loaded
import pytest


def pytest_report_header() -> str:
    """The engine that is tested."""
    return f"ComfyUI {loaded.VERSION} ({loaded.ROOT})"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[headless.Server]:
    """A running server with the pack and the nodes of the tests, for the whole run."""
    with headless.serve(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
