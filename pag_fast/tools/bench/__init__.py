"""Measuring: variants of a pipeline in turns, rows of one schema, tables and plots."""

from .record import Results, Row, Spread, read, write
from .timing import interleave, make_rows
from .user import bench_pipeline

__all__ = [
    "Results",
    "Row",
    "Spread",
    "bench_pipeline",
    "interleave",
    "make_rows",
    "read",
    "write",
]
