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
    Fault(
        "a trace forgets what was kept of cond's forward",
        "pag_fast/runtime/traced.py",
        "self.install(self.patch.layers)",
        "self.start()",
        tests_of("patch_kinds", "first_call_resumes"),
    ),
    Fault(
        "a pass of the loop's own guidance says where uncond is",
        "pag_fast/runtime/loops/observed.py",
        "if before is not None:",
        "if False:",
        tests_of("patch_kinds", "explain_behind_a_call"),
    ),
    Fault(
        "a patch with PAG takes over from one of any kind",
        "pag_fast/patching.py",
        "if isinstance(before, PatchState) and isinstance(new, PatchState):",
        "if before is not None:",
        tests_of("patch_kinds", "one_kind_behind_another"),
    ),
    Fault(
        "verify goes by the patch that a pipeline has",
        "pag_fast/analysis/verify.py",
        "described_with(pipe, perturbs=perturbs).kind",
        "described_with(pipe, perturbs=False).kind",
        tests_of("patch_kinds", "verify_goes_by"),
    ),
    Fault(
        "verify leaves what a stock call has left that raised",
        "pag_fast/analysis/verify.py",
        "if layer.processor is not processor:",
        "if False:",
        tests_of("verify", "stock_leaves"),
    ),
]
