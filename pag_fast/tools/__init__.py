"""What the command line runs: the demo, the benchmark, and the models they load."""

from __future__ import annotations
