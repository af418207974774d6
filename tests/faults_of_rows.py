"""Faults of rows: which are equal, and which an argument has at all."""

from __future__ import annotations

from planting import Fault, tests_of

ROWS = [
    Fault(
        "rows that were equal once are not compared again, whoever's loop it is",
        "pag_fast/sharing/row_equality.py",
        "again = recheck or not self.by_construction",
        "again = recheck",
        tests_of("rows_that_part", "later_step"),
    ),
    Fault(
        "uncond may have a timestep of its own",
        "pag_fast/sharing/row_equality.py",
        "time = None if self.by_construction else call.get(",
        "time = None and call.get(",
        tests_of("rows_that_part", "other_timestep"),
    ),
    Fault(
        "a control picture with one row is cut like one with a row for each",
        "pag_fast/runtime/controlnets.py",
        "if not pictures or not pictures <= everything.keys():",
        "if False:",
        tests_of("rows_that_part", "one_row_for_all"),
    ),
    Fault(
        "residuals without one for the middle are a ControlNet's",
        "pag_fast/runtime/row_decision.py",
        "if plan.takes_adapters and RESIDUALS in call",
        "if False",
        tests_of("rows_that_part", "older_argument"),
    ),
    Fault(
        "rows that depend on each other count as rounding",
        "pag_fast/runtime/separately.py",
        "if not self.rounding <= _MOST_ROUNDING.get(cond.dtype, 1e-4):",
        "if False:",
        tests_of("derived_models", "rows_that_depend"),
    ),
]
