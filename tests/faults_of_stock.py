"""Faults of guidance that is resumed, and of residuals between blocks."""

from __future__ import annotations

from planting import Fault, tests_of

_PASSES = "pag_fast/runtime/stock_passes.py"

STOCK = [
    Fault(
        "cond's rows are the last of a recorded batch, with PAG or without",
        _PASSES,
        "slab = min(self.cond, value.shape[0] // self.unit - 1)",
        "slab = value.shape[0] // self.unit - 1",
        tests_of("stock_guidance", "sd3_beside_pag"),
    ),
    Fault(
        "arguments of a resumed forward are compared once",
        _PASSES,
        "self._compared = self._compared and same",
        "pass",
        tests_of("stock_guidance", "callback_changes"),
    ),
    Fault(
        "a forward is resumed whatever is on the model",
        _PASSES,
        "if whole: return found.why(whole[0])",
        "pass",
        tests_of("stock_guidance_work", "hook_that_nobody"),
    ),
    Fault(
        "a window of steps is open at its ends",
        "pag_fast/pipelines/sd3.py",
        "return layers if after and",
        "return layers if True or",
        tests_of("stock_guidance", "outside_of_the_window"),
    ),
    Fault(
        "residuals that are repeated go by intervals",
        "pag_fast/sharing/layout.py",
        'if call.get("controlnet_blocks_repeat"):',
        "if False:",
        tests_of("block_residuals", "repeated"),
    ),
    Fault(
        "residuals behind the fork are those in front of it",
        "pag_fast/sharing/dit_plan.py",
        "last = fork.index - (not fork.behind)",
        "last = fork.index + (not fork.behind)",
        tests_of("block_residuals", "wherever and True"),
    ),
]
