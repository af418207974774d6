"""Loads the engine before any test module imports it."""

from __future__ import annotations

import loaded


def pytest_report_header() -> str:
    """The engine that is tested."""
    return f"ComfyUI {loaded.VERSION} ({loaded.ROOT})"
